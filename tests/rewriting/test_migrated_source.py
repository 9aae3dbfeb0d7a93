"""A migrated checkpoint is compared with the old one that it was made of, by what is stored there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.formats.safetensors.header import read_header
from aoconvert.rewriting.old_file import OldFile
from aoconvert.sources.byte_source import LocalFile

LEGACY = Path(__file__).parents[1] / "fixtures/legacy"
WEIGHTS, CONVOLUTION = "diffusion_pytorch_model.safetensors", "pos_embed.proj.weight"
PARTS = re.compile(r"\._(data|scale|shift)|\.(input|output)_scale")
TORCHAO, QUANTO = "diffusers-0.33.1-torchao-0.10.0", "quanto"


def numbers(new: Path, old: Path) -> Any:
    report = aoconvert.verify(new, source=str(old), reload=False)
    return report, next(check for check in report.checks if check.name == "numbers")


def change(path: Path, name: str) -> None:
    """One byte in the middle of the codes of a weight."""
    if path.suffix == ".safetensors":
        with LocalFile(path) as file:
            entry = next(e for key, e in read_header(file, "").entries.items() if key.startswith(f"{name}._data"))
        place = (entry.begin + entry.end) // 2
    else:
        with OldFile(path) as old:
            leaf = max((leaf for _, leaf in old.tensors[name].leaves()), key=lambda leaf: leaf.nbytes)
            assert leaf.data is not None
            assert leaf.data.offset is not None
            place = leaf.data.offset + leaf.nbytes // 2
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        (f"{TORCHAO}/int8wo", {}),
        (f"{QUANTO}/diffusers-int4", {"exact": True}),
        pytest.param(f"{TORCHAO}/float8wo_e4m3", {}, marks=pytest.mark.exhaustive),
        pytest.param(f"{QUANTO}/direct-int4", {}, marks=pytest.mark.exhaustive),
        pytest.param(f"{QUANTO}/diffusers-float8", {}, marks=pytest.mark.exhaustive),
    ],
)
def test_one_changed_code_is_found(tmp_path: Path, folder: str, options: dict[str, Any]) -> None:
    old = Path(shutil.copytree(LEGACY / folder, tmp_path / "old"))
    made = aoconvert.migrate(old, output=tmp_path / "new", **options)
    report, check = numbers(made.output, old)
    assert (report.ok, check.status) == (True, "passed"), check.detail
    assert f"{len(made.manifest.components[0].tensors)} tensors compared" in check.detail
    name = next(tensor.name for tensor in made.manifest.components[0].tensors if tensor.migration is not None)
    [weights] = old.glob("diffusion_pytorch_model.*")
    change(weights, name)
    report, check = numbers(made.output, old)
    assert (report.ok, check.status) == (False, "failed")
    what = "values" if options else "codes and scales"
    assert check.detail == f"{name} does not have the {what} of the old checkpoint"


def test_what_was_quantized_again_has_the_stated_error(tmp_path: Path) -> None:
    old = LEGACY / "torchao-0.5.0/fp6_e3m2/model.bin"
    made = aoconvert.migrate(old, output=tmp_path / "new", then="int8wo")
    assert made.counts["requantized"]
    report, check = numbers(made.output, old)
    assert check.status == "passed", check.detail
    assert report.ok


def test_the_original_is_compared_by_its_values(tmp_path: Path) -> None:
    old, original = LEGACY / QUANTO / "direct-int8", tmp_path / "original"
    original.mkdir()
    shutil.copy(old / "config.json", original)
    plain = {name: value for name, value in load_file(old / WEIGHTS).items() if not PARTS.search(name)}
    exact = load_file(old / "dequant.safetensors")
    values = {name: value * 1.02 for name, value in exact.items()}
    save_file({**plain, **values, CONVOLUTION: exact[CONVOLUTION]}, original / WEIGHTS)
    made = aoconvert.migrate(old, output=tmp_path / "new")
    report, check = numbers(made.output, original)
    assert check.status == "passed", check.detail
    assert "worst SQNR" in check.detail
    source = next(item for item in report.checks if item.name == "source")
    assert (source.status, report.ok) == ("skipped", True)
