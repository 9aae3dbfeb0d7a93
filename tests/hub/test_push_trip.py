"""The whole way: quantize, verify, push, download into an empty cache, compare, verify, by LFS and by Xet."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.server import LoopbackHub
from helpers.forking import Forker
from pushing import TOKEN, WITH_TOKEN, XET

Fresh = Callable[..., Path]

DOWNLOAD = """
from huggingface_hub import snapshot_download
import hashlib, os
from pathlib import Path
repo, revision = json.loads(sys.stdin.read())
root = Path(snapshot_download(repo, revision=revision))
result = [str(root), {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
                      for p in root.rglob("*") if p.is_file()}]
"""


@pytest.fixture
def way(request: pytest.FixtureRequest, tmp_path: Path, forker: Forker) -> Iterator[tuple[HubClient, dict[str, str]]]:
    (tmp_path / "hub").mkdir()
    with LoopbackHub(tmp_path / "hub", xet=request.param == "xet") as hub:
        hub.state.add_user("me", TOKEN)
        yield HubClient(hub, tmp_path / "hf_home", forker), XET if request.param == "xet" else WITH_TOKEN


TARGETS = {
    "main": (["--public"], "main"),
    "branch": (["--private", "--revision", "int8"], "int8"),
    "pull request": (["--private", "--create-pr"], "refs/pr/1"),
}
# Each way, kind, target and visibility; the rest of the table is exhaustive.
CHOSEN = {("lfs", "shards", "pull request"), ("xet", "shards", "main"), ("xet", "pipeline", "branch")}
TABLE = [
    pytest.param(*row, marks=[] if row in CHOSEN else pytest.mark.exhaustive, id="-".join(row))
    for row in itertools.product(["lfs", "xet"], ["shards", "pipeline"], TARGETS)
]


@pytest.mark.parametrize(("way", "kind", "target"), TABLE, indirect=["way"])
def test_there_and_back(
    way: tuple[HubClient, dict[str, str]], fresh: Fresh, tmp_path: Path, kind: str, target: str
) -> None:
    client, env = way
    options, revision = TARGETS[target]
    folder = fresh(kind)
    done = client.command("push", "me/trip", str(folder), "--json", *options, env=env)
    assert done.returncode == 0, done.stderr
    pushed = {file["path"]: file["sha256"] for file in json.loads(done.stdout)["files"]}
    puts = client.hub.requests("^/upload/", method="PUT")
    assert bool(puts) == (env is WITH_TOKEN)
    empty = {**env, "HF_HOME": str(tmp_path / "empty")}
    place, found = client.run(DOWNLOAD, env=empty, stdin=json.dumps(["me/trip", revision]))
    found.pop(".gitattributes")
    assert found == pushed
    here = {
        path: hashlib.sha256((folder / path).read_bytes()).hexdigest()
        for path in pushed
        if path != "aoconvert.verify.json"  # its path is the repo's
    }
    assert here == {path: digest for path, digest in pushed.items() if path != "aoconvert.verify.json"}
    card = (folder / "README.md").read_text()
    assert ("'me/trip', revision='int8'" in card) == (revision == "int8")  # main is the default, also of a pull request
    # it was opened before the push; what arrived is opened once, and looked into otherwise
    reload = [] if (kind, target, env) == ("shards", "main", XET) else ["--no-reload"]
    verified = client.command("verify", "me/trip", "--revision", revision, "--json", *reload, env=empty)
    assert verified.returncode == 0, verified.stdout
    report = json.loads(verified.stdout)
    assert report["ok"]
    detail = next(check["detail"] for check in report["checks"] if check["name"] == "reload")
    assert ("with an empty cache" in detail and "different code" not in detail) == (not reload)
    assert Path(place).is_relative_to(tmp_path / "empty")
