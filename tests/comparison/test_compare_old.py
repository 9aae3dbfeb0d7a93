"""Checkpoints by torchao 0.4 to 0.17: real files, compared as what they are in today's classes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

import aoconvert
from aoconvert.formats.torch_bin.header import read_bin

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy"


def model(name: str) -> Path:
    return LEGACY / name / "model.bin"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("torchao-0.4.0/int8wo", "torchao-0.10.0/int8wo"),
        ("torchao-0.10.0/int8dq", "torchao-0.17.0/int8dq_v2"),
        ("torchao-0.5.0/uint4wo_g64", "torchao-0.15.0/uint4wo_g64"),
    ],
)
def test_releases_that_quantized_alike(one: str, other: str) -> None:
    """The same codes and scales under classes, parts and settings of other names, also packed in another way."""
    found = aoconvert.diff(model(one), model(other))
    assert (found.different, found.only_a, found.only_b, found.same) == ((), (), (), 12)


def test_releases_that_quantized_otherwise() -> None:
    found = aoconvert.diff(model("torchao-0.10.0/int8wo"), model("torchao-0.15.0/int8wo_v2"))
    assert found.same == 8
    assert [item.what for item in found.different] == ["codes"] * 4
    assert all(item.sqnr_db is not None and 26 < item.sqnr_db < 28 for item in found.different)
    assert all("zero_point" not in item.detail for item in found.different)


def test_one_code_of_an_old_file(tmp_path: Path) -> None:
    """The file as it is, but for one byte."""
    copy = Path(shutil.copy(model("torchao-0.10.0/int8wo"), tmp_path / "model.bin"))
    name = "blocks.0.ff.net.weight"
    codes = dict(read_bin(copy).tensors[name].leaves())["tensor_impl.int_data"]
    assert codes.data is not None
    assert codes.data.offset is not None
    with copy.open("r+b") as file:
        file.seek(codes.data.offset + 7)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    [item] = aoconvert.diff(model("torchao-0.10.0/int8wo"), copy).different
    assert (item.name, item.what, item.detail) == (name, "codes", f"1 of {math.prod(codes.shape):,} qdata")
    assert item.sqnr_db is not None


def test_an_old_file_and_plain_weights(tmp_path: Path) -> None:
    name = model("torchao-0.10.0/int8wo")
    plain = {key: torch.ones(tensor.shape) for key, tensor in read_bin(name).tensors.items()}
    torch.save(plain, tmp_path / "plain.bin")
    found = aoconvert.diff(name, tmp_path / "plain.bin")
    assert {item.what for item in found.different} == {"class", "dtype"}
    assert all(item.sqnr_db is not None for item in found.different if item.what == "class")


def test_quanto_files() -> None:
    """Who saved them makes no difference; one of them quantized a convolution, too."""
    folder = LEGACY / "quanto"
    found = aoconvert.diff(folder / "diffusers-int8", folder / "direct-int8")
    [item] = found.different
    assert (item.name, item.what) == ("pos_embed.proj.weight", "class")
    assert item.sqnr_db is not None
    assert found.only_a == ()
    assert found.only_b == ("pos_embed.proj.input_scale", "pos_embed.proj.output_scale")


@pytest.mark.parametrize("name", ["diffusers-float8", "direct-int4"])
def test_quanto_and_what_migrate_makes_of_it(name: str, tmp_path: Path) -> None:
    """The same codes and scales; only the scales for activations have no place."""
    source = LEGACY / "quanto" / name
    aoconvert.migrate(source, output=tmp_path / "out")
    found = aoconvert.diff(source, tmp_path / "out")
    convolutions = {"pos_embed.proj.weight": None} if name.startswith("direct") else {}
    assert {item.name: item.sqnr_db for item in found.different} == convolutions  # their values are the same numbers
    assert found.same == 36 - len(convolutions)
    assert all(key.endswith(("input_scale", "output_scale")) for key in found.only_a)
    assert found.only_b == ()
