"""A result on the Hub: fetched, and verified like a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub.fixtures import HubClient

import aoconvert


def test_a_repo(hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    aoconvert.quantize(checkpoints("opt"), "int8wo", output=out, device="cpu")
    hub_client.hub.state.create_repo("user/opt-int8wo")
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    commit = hub_client.hub.state.commit("user/opt-int8wo", {**files, "README.md": b"# card", ".gitattributes": b"*"})
    report = hub_client.run("import aoconvert\nresult = aoconvert.verify('user/opt-int8wo').to_dict()")
    assert report["ok"], report
    reload = next(check for check in report["checks"] if check["name"] == "reload")
    assert reload["status"] == "passed"
    assert f"from the Hub (user/opt-int8wo, main at {commit[:12]}) with an empty cache" in reload["detail"]
    assert "README.md shows different code" in reload["detail"]
    assert report["path"] == "user/opt-int8wo"
    assert report["published"] == {"repo_id": "user/opt-int8wo", "revision": "main", "commit": commit}
    # fetched twice: to be checked, and by the code; nothing is written into the Hub's cache
    weights = hub_client.hub.state.entries("user/opt-int8wo", commit)["pytorch_model.bin"].oid
    assert len(hub_client.hub.requests(f"/lfs/{weights}", method="GET")) == 2
    assert [path.name for path in hub_client.home.rglob("aoconvert.verify.json")] == []
    assert [path.name for path in hub_client.home.iterdir() if "empty" in path.name] == []


def test_the_command_fails_with_its_exit_code(
    hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """What is on the Hub is not what the manifest lists: damaged by who pushed it, or pushed without all files."""
    out = tmp_path / "out"
    aoconvert.quantize(checkpoints("opt"), "int8wo", output=out, device="cpu")
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    weights = bytearray(files["pytorch_model.bin"])
    weights[len(weights) // 2] ^= 1
    damages = {
        "one-bit": (
            {**files, "pytorch_model.bin": bytes(weights)},
            "pytorch_model.bin is not the file that",
        ),
        "no-weights": ({p: c for p, c in files.items() if p != "pytorch_model.bin"}, "pytorch_model.bin is missing"),
        "not-a-manifest": ({**files, "aoconvert.json": b"{"}, "cannot be read: not valid JSON (line 1)"),
    }
    for name, (content, says) in damages.items():
        hub_client.hub.state.create_repo(f"user/{name}")
        hub_client.hub.state.commit(f"user/{name}", content)
        done = hub_client.command("verify", f"user/{name}")
        assert done.returncode == 4, done.stderr
        assert says in " ".join(done.stdout.split())
        assert "Traceback" not in done.stderr + done.stdout
        assert f"not verified: user/{name}" in done.stdout


def test_a_repo_that_is_no_result(hub_client: HubClient, checkpoints: Callable[[str], Path]) -> None:
    hub_client.hub.state.create_repo("user/plain")
    source = checkpoints("opt")
    hub_client.hub.state.commit("user/plain", {path.name: path for path in source.iterdir() if path.is_file()})
    result = hub_client.run("import aoconvert\nresult = aoconvert.verify('user/plain').to_dict()")
    assert result["ok"] is False
    [check] = result["checks"]
    assert (check["name"], check["status"]) == ("manifest", "failed")
    assert "holds no torchao model" in check["detail"]


def test_a_device_that_is_not_here(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is such a device here")
    aoconvert.quantize(checkpoints("opt"), "int8wo", output=tmp_path / "out", device="cpu")
    report = tmp_path / "out" / "aoconvert.verify.json"
    report.write_text("what an earlier verification found")
    with pytest.raises(aoconvert.PlanError, match="device cuda is not available"):
        aoconvert.verify(tmp_path / "out", device="cuda")
    assert report.read_text() == "what an earlier verification found"
