"""``verify --source`` of a repo asks the Hub as the command's own options say: token, cache, whether at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_hub.fixtures import HubClient

import aoconvert

TOKEN = "hf_" + "sOuRcE" * 6
REPO = "user/private"


def verified(hub_client: HubClient, out: Path, *words: str, code: int) -> Any:
    done = hub_client.command("verify", str(out), "--source", REPO, "--no-reload", "--json", *words)
    assert done.returncode == code, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_source_is_fetched_with_this_token_into_this_cache_or_not_at_all(
    hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    state, source, out = hub_client.hub.state, checkpoints("opt"), tmp_path / "out"
    state.add_user("me", TOKEN)
    state.create_repo(REPO, private=True, readers=["me"])
    state.commit(REPO, {path.name: path for path in source.iterdir()})
    aoconvert.quantize(source, "int8wo", output=out, device="cpu")
    without, cache = tmp_path / "without", tmp_path / "cache"
    for token, place, offline, code in [
        (None, cache, False, 5),  # the repo is private
        (TOKEN, cache, False, 0),
        (None, cache, True, 0),
        (TOKEN, without, True, 5),
    ]:
        asked = len(hub_client.hub.requests(""))
        words = ["--cache-dir", str(place), *(["--token", token] if token else [])]
        document = verified(hub_client, out, *words, *(["--local-files-only"] if offline else []), code=code)
        sent = hub_client.hub.requests("")[asked:]
        assert bool(sent) != offline
        assert {request.token for request in sent if request.server == "hub"} <= {token}
        if code == 0:
            checks = {check["name"]: check["status"] for check in document["checks"]}
            assert (checks["source"], checks["numbers"]) == ("passed", "passed")
        else:
            assert REPO in document["error"]["message"]
    assert [path.name for path in cache.glob("models--*")] == ["models--user--private"]
    assert not [*without.glob("models--*"), *hub_client.home.glob("hub/models--*")]
