"""``verify --source``: whether the given source is what was quantized, said in one line before all is compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.manifest import Manifest
from aoconvert.sources import resolve
from aoconvert.verification.original import check_source

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("source") / "out"
    return aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=out, device="cpu").manifest


def same_tensors_again(folder: Path) -> None:
    """The same tensors under another header: what the library opens is equal."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", "note": "saved again"})


def one_bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "saved again": (same_tensors_again, "bytes, what was read had"),
    "one bit": (one_bit, "model.safetensors has a different SHA-256"),
    "gone": (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors is missing"),
    "another name": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.safetensors"), "model.safetensors is missing"),
    "another config": (lambda folder: (folder / "generation_config.json").write_text("{}"), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_what_was_quantized(
    change: str, made: Manifest, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints("llama-tied"), tmp_path / "mine"))
    assert check_source(resolve(str(folder)), made.source)[0] == "passed"
    edit, says = CHANGES[change]
    edit(folder)
    status, detail = check_source(resolve(str(folder)), made.source)
    assert status == ("failed" if says else "passed")
    if says:
        assert detail.startswith("mine is not what was quantized: ")
        assert detail.endswith(says) or says in detail
        assert "\n" not in detail


def test_one_part_of_a_pipeline(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    made = aoconvert.quantize(
        checkpoints("flux"), "int8wo", output=tmp_path / "out", device="cpu", component_only=True
    ).manifest
    for source in (checkpoints("flux"), checkpoints("flux") / "transformer"):
        assert check_source(resolve(str(source)), made.source)[0] == "passed"
    assert check_source(resolve(str(checkpoints("flux") / "vae")), made.source)[0] == "failed"


@pytest.mark.parametrize("reload", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_it_is_said_and_all_is_compared(reload: bool, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """The same tensors in another file: the library finds no difference, and the file is another one."""
    folder = Path(shutil.copytree(checkpoints("llama-tied"), tmp_path / "mine"))
    same_tensors_again(folder)
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=tmp_path / "out", device="cpu")
    report = aoconvert.verify(tmp_path / "out", source=str(folder), reload=reload, forward=False)
    status = {check.name: check.status for check in report.checks}
    library = "passed" if reload else "skipped"
    assert (status["source"], status["library"], status["numbers"]) == ("failed", library, "passed"), report.to_dict()
    assert report.exit_code == 4
    assert manifests.load(tmp_path / "out").source.files[0].path == WEIGHTS
