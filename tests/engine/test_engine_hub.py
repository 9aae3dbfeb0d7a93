"""From a Hub repo to a result, with the released client against a real HTTP server on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_hub.fixtures import HubClient
from fake_hub.server import total_bytes
from safetensors.torch import load_file, save_file

import aoconvert

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
    local = json.loads(json.dumps(aoconvert.plan(source, "int8wo", device="cpu").to_dict()))
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


@pytest.mark.exhaustive
def test_ties_are_decided_by_as_little_as_it_takes(
    hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two tensors that are declared one: of a repo on the Hub their values are read until they differ."""
    folder = tmp_path / "source"
    shutil.copytree(checkpoints("llama-tied"), folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 20_000}))
    state = load_file(folder / "model.safetensors")
    table = torch.randn(20_000, state["model.embed_tokens.weight"].shape[1]).bfloat16()
    for name, row in (("first", 0), ("last", -1), ("none", None)):
        head = table.clone()
        if row is not None:
            head[row] += 1
        save_file({**state, "model.embed_tokens.weight": table, "lm_head.weight": head}, folder / "model.safetensors")
        publish(hub_client, folder, f"user/{name}")
    actions = hub_client.run(
        "import aoconvert\n"
        "def planned(name):\n"
        "    made = aoconvert.plan(f'user/{name}', 'int8wo', device='cpu', min_quantized=0.0).to_dict()\n"
        "    return {t['name']: t['action'] for t in made['components'][0]['tensors']}['lm_head.weight']\n"
        "result = [planned(name) for name in ('first', 'last', 'none')]"
    )
    assert actions == ["keep", "keep", "tied"]
    read = {name: _asked_for(hub_client, f"user/{name}/.*{WEIGHTS}") for name in ("first", "last", "none")}
    header = 100_001 + 8  # what the client asks for first, and where the data begin
    block = 1024 * table[0].nbytes
    assert block == 65_536
    assert 2 * block <= read["first"] <= header + 2 * block
    assert 2 * table.nbytes <= read["last"] == read["none"] <= header + 2 * table.nbytes


def _asked_for(hub: HubClient, path: str) -> int:
    """Bytes of all ranges that were asked for."""
    ranges = [request.range for request in hub.hub.requests(path, method="GET", server="hub")]
    bounds = [text.removeprefix("bytes=").split("-") for text in ranges if text]
    return sum(int(end) - int(begin) + 1 for begin, end in bounds)


@pytest.mark.exhaustive
def test_torch_files_are_here_before_the_plan(
    hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Only the whole file tells what is in it: of a component and of a part that is not quantized."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("cogvideox"), source)
    for path in list(source.glob("*/*.safetensors")):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    publish(hub_client, source)
    planned, made = hub_client.run(
        "import aoconvert\n"
        "planned = aoconvert.plan('user/model', 'int8wo', device='cpu').to_dict()['unquantized']\n"
        f"made = aoconvert.quantize('user/model', 'int8wo', output={str(tmp_path / 'out')!r}, device='cpu')\n"
        "result = planned, made.manifest.model_dump(mode='json')"
    )
    assert [(part["name"], part["tensors"]) for part in planned] == [("text_encoder", []), ("vae", [])]
    assert made["components"][0]["totals"]["quantized_parameters"] > 0
    for part in made["unquantized"]:
        [file] = part["files"]
        before = torch.load(source / file["path"], weights_only=True)
        after = torch.load(tmp_path / "out" / file["path"], weights_only=True)
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
