"""Values without a scale: what torchao makes of zeros, and what is left of them after the repair."""

from typing import Any

import pytest
import torch
from helpers.bits import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_table import ROWS, attributes, inner

from aoconvert import schemes
from aoconvert.schemes.apply import quantize_weight
from aoconvert.schemes.tensors import dequantize, repair

FLOAT8 = [row.scheme for row in ROWS if row.tensor_class == "Float8Tensor"]
FEW = [row.scheme for row in ROWS if row.tensor_class != "IntxUnpackedToInt8Tensor"] + ["intx4wo", "uint4wo", "int4dq"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def copies(tensor: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in inner(tensor).items()}


@pytest.mark.parametrize("name", FEW)
def test_a_weight_of_zeros_loads_as_zeros(name: str) -> None:
    made = quantize_weight(torch.zeros(128, 256, dtype=torch.bfloat16), schemes.get(name))
    repaired = repair(made)
    values = dequantize(made)
    assert torch.equal(values, torch.zeros_like(values))
    assert repair(made) == 0
    rows_or_whole = {"per row": 128, "per tensor": 1, "per block of 128x128": 2, "per group of 16, and per tensor": 1}
    broken = name in FLOAT8 or name.startswith("nvfp4")
    assert repaired == (rows_or_whole[schemes.get(name).format.granularity] if broken else 0)


@pytest.mark.parametrize("name", FEW)
def test_only_what_is_broken_changes(name: str) -> None:
    values = normal(128, 256)
    values[3], values[5, :64] = 0, 0
    made = quantize_weight(values, schemes.get(name))
    before, described = copies(made), attributes(made)
    lost = not torch.isfinite(dequantize(made)[3]).all()
    assert repair(made) == lost
    assert attributes(made) == described
    if not lost:
        assert all(torch.equal(bits(tensor), bits(before[key])) for key, tensor in inner(made).items())
        return
    other = torch.arange(128) != 3
    for key in ("qdata", "scale"):
        assert torch.equal(bits(inner(made)[key][other]), bits(before[key][other]))
    assert torch.equal(dequantize(made)[3], torch.zeros(256))
    assert torch.isfinite(inner(made)["scale"].float()).all()
    assert not bits(inner(made)["qdata"][3]).any()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["float8wo", "float8dq_row", "float8wo_e5m2", "float8dq_block"]),
    st.lists(st.integers(0, 1), min_size=2, max_size=4),
    st.integers(0, 3),
)
def test_groups_blocks_and_experts_are_repaired(name: str, zero: list[int], seed: int) -> None:
    """Whole groups, blocks or rows of zeros in stacked experts."""
    group = 64 if name.startswith("float8wo") else None
    values = normal(len(zero), 128, 256, seed=seed)
    for expert, gone in enumerate(zero):
        if gone:
            values[expert, :, 128:] = 0
            values[expert, :64] = 0
    made = quantize_weight(values, schemes.get(name, group_size=group))
    count = repair(made)
    kept = dequantize(made)
    assert torch.isfinite(kept).all()
    assert torch.equal(kept[values == 0], torch.zeros(int((values == 0).sum())))
    per_expert = {"float8dq_row": 64, "float8dq_block": 1}.get(name, 64 * 4 + 64 * 2)
    assert count == per_expert * sum(zero)


def test_one_of_several_experts_of_nvfp4_is_repaired() -> None:
    values = normal(3, 128, 64)
    values[1] = 0
    made = quantize_weight(values, schemes.get("nvfp4"))
    before = copies(made)
    assert repair(made) == 1
    assert torch.isfinite(dequantize(made)).all()
    for key, tensor in inner(made).items():
        assert all(torch.equal(bits(tensor[index]), bits(before[key][index])) for index in (0, 2))


def test_a_row_too_small_for_a_scale_counts_as_zeros() -> None:
    values = normal(4, 32).float()
    values[2] = 1e-44
    made = quantize_weight(values, schemes.get("float8wo"))
    assert repair(made) == 1
    assert torch.equal(dequantize(made)[2], torch.zeros(32))


def test_plain_tensors_and_meta_are_left_alone() -> None:
    assert repair(torch.zeros(2, 3)) == 0
    assert repair(quantize_weight(torch.zeros(16, 32, device="meta"), schemes.get("float8wo"))) == 0
