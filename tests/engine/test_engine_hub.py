"""From a Hub repo to a result, with the released client against a real HTTP server on loopback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from hub.fixtures import HubClient
from hub.server import total_bytes

WEIGHTS = r"\.safetensors"
TOKEN = "hf_" + "tOkEn" * 6


def publish(hub: HubClient, folder: Path, repo_id: str = "user/model") -> str:
    hub.hub.state.create_repo(repo_id)
    files: dict[str, bytes | Path] = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    return hub.hub.state.commit(repo_id, {**files, "README.md": b"---\nlicense: mit\n---\n", "model.ckpt": b"no" * 999})


def test_plan_fetches_no_weights(hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Configs and headers only; and the plan is that of the folder."""
    source = checkpoints("cogvideox")
    publish(hub_client, source)
    made = hub_client.run(
        "import aoconvert\nresult = aoconvert.plan('user/model', 'int8wo', device='cpu').to_dict()",
    )
    fetched = hub_client.hub.requests(WEIGHTS)
    size = (source / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert size > 7_000_000
    stored = hub_client.hub.requests(".*", server="store")  # weights come from another server, by a redirect
    assert 0 < total_bytes(stored) < 320_000  # the client asks for the first 100 kB of each of three files
    assert {Path(request.path).parent.name for request in fetched} == {"text_encoder", "transformer", "vae"}
    local = hub_client.run(
        f"import aoconvert\nresult = aoconvert.plan({str(source)!r}, 'int8wo', device='cpu').to_dict()"
    )
    assert made["components"] == local["components"]
    assert made["unquantized"] == local["unquantized"]


def test_quantize_then_offline_then_the_same_bytes(
    hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints("cogvideox")
    sha = publish(hub_client, source)
    script = (
        "import aoconvert\n"
        "made = aoconvert.quantize('user/model', 'int8wo', output={out!r}, device='cpu'{more})\n"
        "result = json.loads(made.manifest.model_dump_json())"
    )
    online, offline = tmp_path / "online", tmp_path / "offline"
    manifest = hub_client.run(script.format(out=str(online), more=""))
    assert manifest["source"]["repo_id"] == manifest["source"]["base_model"] == "user/model"
    assert manifest["source"]["revision"] == sha
    assert manifest["source"]["license"] == "mit"
    assert f"--revision {sha}" in manifest["run"]["command"]
    assert len(manifest["source"]["files"]) == 3
    for weights in manifest["source"]["files"]:
        assert weights["sha256"] == hashlib.sha256((source / weights["path"]).read_bytes()).hexdigest()
    assert not hub_client.hub.requests(r"model\.ckpt")
    before = len(hub_client.hub.requests(".*"))
    hub_client.run(script.format(out=str(offline), more=", local_files_only=True"))
    assert len(hub_client.hub.requests(".*")) == before
    for path in online.rglob("*"):
        if path.is_file() and path.name != "aoconvert.json":
            assert path.read_bytes() == (offline / path.relative_to(online)).read_bytes()


def test_a_damaged_cache_is_noticed(hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """The Hub names the SHA-256 of a weights file; what is read must have it."""
    publish(hub_client, checkpoints("llama-tied"))
    hub_client.run("s = resolve('user/model'); s.fetch(['model.safetensors']); result = 1")
    [blob] = [path for path in hub_client.home.rglob("model.safetensors") if path.is_symlink()]
    content = bytearray(blob.resolve().read_bytes())
    content[-5] ^= 4
    blob.resolve().write_bytes(content)
    result = hub_client.run(
        "import aoconvert\n"
        f"result = attempt(lambda: str(aoconvert.quantize('user/model', 'int8wo', output={str(tmp_path / 'out')!r})))"
    )
    assert result["error"] == "ReadError"
    assert "model.safetensors is damaged" in result["message"]
    assert not (tmp_path / "out").exists()


def test_the_token_is_nowhere(hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    hub_client.hub.state.add_user("user", TOKEN)
    hub_client.hub.state.create_repo("user/secret", private=True, readers=["user"])
    folder = checkpoints("llama-tied")
    hub_client.hub.state.commit("user/secret", {p.name: p for p in folder.iterdir() if p.is_file()})
    out = tmp_path / "out"
    refused = hub_client.run("import aoconvert\nresult = attempt(lambda: str(aoconvert.plan('user/secret', 'int8wo')))")
    assert refused["exit_code"] == 5
    shown = hub_client.run(
        "import aoconvert\ntoken = sys.stdin.read()\n"
        f"made = aoconvert.quantize('user/secret', 'int8wo', output={str(out)!r}, token=token)\n"
        "plan = aoconvert.plan('user/secret', 'int8wo', token=token, output='/tmp/never')\n"
        "result = repr(made) + repr(plan) + json.dumps(plan.to_dict())",
        stdin=TOKEN,
    )
    assert TOKEN not in shown
    for path in out.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in json.dumps(json.loads((out / "aoconvert.json").read_text()))
