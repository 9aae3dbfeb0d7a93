"""Any description of a tensor is migrated to a tensor of its shape, or refused by name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Symbol
from aoconvert.rewriting.migrate_types import CannotMigrate, read_meta
from aoconvert.rewriting.old_file import OldFile
from aoconvert.rewriting.old_torchao.decide import decide

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy"
ENUM = "torchao.quantization.quant_primitives.ZeroPointDomain"
ROW = "torchao.quantization.granularity.PerRow"
VALUES: list[Any] = [
    *(None, 0, -1, 3, 10**12, True, 1.5, "x", b"x", {}, (), (1,), (2, 2), (0, 0), (1, 32), (1, 128)),
    *(Symbol("torch.int4"), Symbol("torch.float8_e4m3fn"), Instance(ENUM, (2,)), Instance(ENUM, ("x",))),
    *(Instance(ROW, (), {"dim": -1}), Instance(ROW, (), {"unknown": 1})),
]
SHAPES = [(), (64,), (1, 1), (64, 128), (128, 64), (63, 127), (0, 128), (64, 128, 1)]
DTYPES = ["int8", "uint8", "int4", "int64", "bool", "bfloat16", "float32", "float8_e4m3fn"]


@pytest.fixture(scope="module")
def pool() -> Iterator[list[tuple[OldFile, BinTensor]]]:
    files = [OldFile(path) for path in sorted(LEGACY.glob("torchao-*/*/model.bin"))]
    yield [(file, tensor) for file in files for tensor in file.tensors.values() if tensor.data is None]
    for file in files:
        file.close()


def change(tensor: BinTensor, leaves: list[BinTensor], names: list[str], source: random.Random) -> BinTensor:
    """One thing about a tensor, or about one within it, is another."""
    if tensor.data is not None:
        return source.choice(leaves)
    inner, attributes = dict(tensor.inner), dict(tensor.attributes)
    what = source.choice(["inner", "inner", "without", "attribute", "less", "shape", "dtype", "class"])
    if what in ("inner", "without") and inner:
        name = source.choice(list(inner))
        inner[name] = change(inner[name], leaves, names, source)
        if what == "without":
            del inner[name]
    elif what in ("attribute", "less") and attributes:
        name = source.choice(list(attributes))
        attributes[name] = source.choice(VALUES)
        if what == "less":
            del attributes[name]
    elif what == "shape":
        return replace(tensor, shape=source.choice(SHAPES))
    elif what == "dtype":
        return replace(tensor, dtype=source.choice(DTYPES))
    else:
        return replace(tensor, class_name=source.choice(names))
    return replace(tensor, inner=inner, attributes=attributes)


@settings(max_examples=400, deadline=None)
@given(source=st.randoms(use_true_random=False), packed_on=st.sampled_from([None, "avx512", "avx2", "generic"]))
def test_any_description_is_a_tensor_or_a_refusal(
    pool: list[tuple[OldFile, BinTensor]], source: random.Random, packed_on: str | None
) -> None:
    file, tensor = source.choice(pool)
    leaves = [leaf for other in file.tensors.values() for _, leaf in other.leaves()]
    names = sorted({other.class_name for _, other in pool})
    for _ in range(source.randrange(1, 3)):
        tensor = change(tensor, leaves, names, source)
    if tensor.data is not None:
        return
    try:
        outcome = decide(tensor, file.read, packed_on)
    except CannotMigrate as refusal:
        assert str(refusal)
        assert "\n" not in str(refusal)
        return
    for read in (read_meta, file.read):
        made = outcome.make(read)
        assert (made.shape, str(made.dtype)) == (tensor.shape, f"torch.{tensor.dtype}")
