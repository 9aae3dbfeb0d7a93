"""Damage and forgery, each found by the check that is there for it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import Manifest
from aoconvert.checkpoint.report import Report


@pytest.fixture(scope="module")
def result(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with three shards. Copied by whoever damages it."""
    out = tmp_path_factory.mktemp("verify") / "out"
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=out, device="cpu", max_shard_size="12KB")
    return out


@pytest.fixture
def copy(result: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result, tmp_path / "out"))


def check(folder: Path, **options: Any) -> Report:
    return aoconvert.verify(folder, reload=False, **options)


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if check.status == "failed"}


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and make everything in it fit again: file hashes and its own digest."""
    values = json.loads((folder / "aoconvert.json").read_text())
    change(values)
    entries = [file for item in values["components"] for file in item["files"]] + values["copied"]
    for entry in entries:
        place = folder / entry["path"]
        if place.is_file():
            entry["size"], entry["sha256"] = place.stat().st_size, file_sha256(place)
    values["run"]["digest"] = None
    (folder / "aoconvert.json").write_text(manifests.dump(Manifest.model_validate(values)))


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Load a .bin, change its dict, and write it again."""
    torch.save(change(dict(torch.load(path, weights_only=True))), path)


def shard(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("*.bin"))[number]


def test_a_clean_one_passes(copy: Path) -> None:
    report = check(copy)
    assert report.ok, report.to_dict()
    statuses = {item.name: item.status for item in report.checks}
    assert statuses == {
        "manifest": "passed", "files": "passed", "pickle": "passed", "versions": "passed", "load": "passed",
        "reload": "skipped", "library": "skipped", "numbers": "passed", "forward": "skipped",
    }  # fmt: skip
    written = json.loads((copy / "aoconvert.verify.json").read_text())
    assert written["ok"] is True
    assert written["manifest_sha256"] == file_sha256(copy / "aoconvert.json")


def test_300_bit_flips(result: Path, tmp_path: Path) -> None:
    """One bit, anywhere, in any file: always found, before anything is loaded."""
    copy = Path(shutil.copytree(result, tmp_path / "out"))
    files = sorted(path for path in copy.iterdir() if path.is_file())
    chance = random.Random(20261120)
    missed = []
    for _ in range(300):
        path = chance.choice(files)
        content = path.read_bytes()
        position, bit = chance.randrange(len(content)), chance.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        report = check(copy)
        wrong = failed(report)
        if set(wrong) != ({"manifest"} if path.name == "aoconvert.json" else {"files"}):
            missed.append((path.name, position, bit, wrong))
        path.write_bytes(content)
    assert missed == []


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin.index.json"])
def test_a_changed_config(copy: Path, name: str) -> None:
    values = json.loads((copy / name).read_text())
    values["more"] = 1
    (copy / name).write_text(json.dumps(values))
    assert name in failed(check(copy))["files"]


def test_a_truncated_file(copy: Path) -> None:
    content = shard(copy).read_bytes()
    shard(copy).write_bytes(content[:-100])
    assert f"{shard(copy).name} has {len(content) - 100} bytes" in failed(check(copy))["files"]


def test_a_missing_file(copy: Path) -> None:
    gone = shard(copy, 1)
    gone.unlink()
    assert f"{gone.name} is missing" in failed(check(copy))["files"]


def test_two_shards_that_changed_places(copy: Path) -> None:
    first, second = shard(copy, 0), shard(copy, 1)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert first.name in failed(check(copy))["files"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "extra.bin", "modeling.py"])
def test_a_file_too_many(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"{}")
    assert name in failed(check(copy))["files"]


def test_a_link_out_of_the_folder(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    (copy / "config.json").rename(outside)
    (copy / "config.json").symlink_to(outside)
    assert not check(copy).ok


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "C:\\x"])
def test_a_path_that_leaves_the_folder(copy: Path, path: str) -> None:
    values = json.loads((copy / "aoconvert.json").read_text())
    values["copied"].append({"path": path, "size": 1, "sha256": "0" * 64})
    (copy / "aoconvert.json").write_text(json.dumps(values))
    assert "manifest" in failed(check(copy))


def test_an_edited_manifest(copy: Path) -> None:
    text = (copy / "aoconvert.json").read_text()
    assert '"scheme": "int8wo"' in text
    (copy / "aoconvert.json").write_text(text.replace('"scheme": "int8wo"', '"scheme": "int8dq"'))
    assert "edited or damaged" in failed(check(copy))["manifest"]


def test_a_newer_schema(copy: Path) -> None:
    forge(copy, lambda values: None)
    text = (copy / "aoconvert.json").read_text().replace('"schema_version": 1', '"schema_version": 2')
    (copy / "aoconvert.json").write_text(text)
    assert "schema_version 2" in failed(check(copy))["manifest"]


def test_what_is_not_what_the_manifest_says(copy: Path) -> None:
    """A name, one element of one tensor, a class, and a version that is not here, though every file hash fits."""
    renamed, changed = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"
    plain = "model.layers.0.self_attn.q_proj.weight"

    def change(state: dict[str, Any]) -> dict[str, Any]:
        state[changed].view(-1)[0] += 1
        state[plain] = state[plain].dequantize()
        return state

    rewrite(shard(copy, 0), lambda state: {f"{name}x" if name == renamed else name: t for name, t in state.items()})
    rewrite(shard(copy, 1), change)
    forge(copy, lambda values: values["components"][0].update(loads_with={"torchao": ">=99.0", "torch": ">=2.6"}))
    wrong = failed(check(copy))
    assert set(wrong) == {"versions", "load"}
    assert "the checkpoint needs torchao>=99.0" in wrong["versions"]
    assert f"{renamed} is missing" in wrong["load"]
    assert f"{renamed}x is not in the manifest" in wrong["load"]
    assert f"{changed}: its sha256 is" in wrong["load"]
    assert f"{plain}: its class is torch.Tensor, but the manifest says torchao" in wrong["load"]


def test_bad_scales(copy: Path) -> None:
    """A checkpoint that was broken when it was made: every hash is right, the numbers are not."""
    from aoconvert.formats.torch_bin.writer import content_sha256

    bad = {"model.layers.0.self_attn.q_proj.weight": float("nan"), "model.layers.0.self_attn.v_proj.weight": 0.0}
    hashes = {}

    def change(state: dict[str, Any]) -> dict[str, Any]:
        for name, value in bad.items():
            state[name].scale.view(-1)[3] = value
            hashes[name] = content_sha256(state[name])
        return state

    def fit(values: dict[str, Any]) -> None:
        for tensor in values["components"][0]["tensors"]:
            tensor["sha256"] = hashes.get(tensor["name"], tensor["sha256"])

    rewrite(shard(copy, 1), change)
    forge(copy, fit)
    (copy / "aoconvert.verify.json").write_text("{}")  # the report of a run before is no foreign file
    report = check(copy)
    assert set(failed(report)) == {"numbers"}
    said = [f"{name}: scale {problem}" for name, problem in zip(bad, ("holds NaN or infinity", "is zero"), strict=True)]
    assert failed(report)["numbers"] == "; ".join(said)


def test_a_global_that_the_manifest_does_not_list(copy: Path) -> None:
    forge(copy, lambda values: values["components"][0].update(safe_globals=[]))
    assert "which the manifest does not list" in failed(check(copy))["pickle"]


def test_a_safe_list_that_is_too_short_cannot_be_helped_by_imports(copy: Path) -> None:
    """`import torchao` registers its classes for the whole process; the load check takes that back."""
    from aoconvert.verification.process import Children

    request = {"files": [str(path) for path in copy.glob("*.bin")], "imports": ["torchao"], "safe_globals": []}
    with Children() as children:
        answers = children.ask("load_child", request)
    assert "Unsupported global" in answers[-1]["error"]


def test_a_pickle_that_runs_something(copy: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    torch.save({"weight": Evil()}, shard(copy))
    forge(copy, lambda values: None)
    report = check(copy)
    assert "system" in failed(report)["pickle"]
    assert report.check("load") is None
    assert not canary.exists()
    with pytest.raises(aoconvert.VerificationError, match="system"):
        aoconvert.load(copy)
    assert not canary.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["imports"].append("os; import evil"),
        lambda c: c["imports"].append("antigravity"),
        lambda c: c["safe_globals"].append("os.system"),
        lambda c: c["safe_globals"].append("torch.hub.load"),
        lambda c: c.update(class_name="Llama\nimport os"),
        lambda c: c["load"].update(kwargs={"trust_remote_code": "True"}),
        lambda c: c["load"].update(kwargs={"torch_dtype": "bfloat16); import os; ("}),
        lambda c: c.update(path="elsewhere"),
    ],
)
def test_a_hostile_manifest_injects_nothing(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    forge(copy, lambda values: change(values["components"][0]))
    report = check(copy)
    assert set(failed(report)) in ({"manifest"}, {"files"})
    assert report.check("pickle") is None
    assert report.check("load") is None


def test_a_layout_whose_device_is_not_here(copy: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is such a device here")
    forge(copy, lambda values: values["components"][0]["layout"].update(device="cuda", min_capability=[8, 0]))
    report = aoconvert.verify(copy)
    assert report.ok
    skipped = {item.name: item.detail for item in report.checks if item.status == "skipped"}
    assert set(skipped) == {"versions", "library", "forward"}
    assert skipped["forward"] == skipped["versions"] == "its layout is for cuda, and this device is not available here"
    reload = report.check("reload")
    assert reload is not None and reload.detail.endswith(", on cpu")
    assert report.device == "cpu"
    assert set(failed(check(copy, require_device=True))) == {"versions"}


def test_without_a_manifest_what_a_loader_takes_first(copy: Path) -> None:
    (copy / "aoconvert.json").unlink()
    (copy / "dequant.safetensors").write_bytes(b"of no interest to a loader")
    assert check(copy).ok
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (copy / name).write_bytes(b"{}")
        wrong = failed(check(copy))
        assert name in " ".join(wrong.values())
        assert set(wrong) <= {"manifest", "files", "pickle"}
        (copy / name).unlink()
