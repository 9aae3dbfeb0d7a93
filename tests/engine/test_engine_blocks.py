"""Blocks of rows, put together, are what torchao makes of the whole weight: for every scheme, to the last bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.bits import assert_same
from helpers.one_tensor import begin, quantize_rows, quantize_tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemes.scheme_table import VARIANTS, get, variant_id, weight_shape

from aoconvert import schemes
from aoconvert.engine import blocks
from aoconvert.engine.assembly import Assembly
from aoconvert.engine.block_quantizer import BlockQuantizer, WeightSlice, threads
from aoconvert.errors import QuantizeError
from aoconvert.schemes import Scheme
from aoconvert.schemes.apply import quantize_weight
from aoconvert.schemes.error_stats import ErrorStats

BF16 = torch.bfloat16
INT4 = [
    (f"int4wo-{device}-{group}", schemes.get("int4wo", group_size=group, layout_device=device))
    for device in ("cpu", "cuda", "xpu")
    for group in (32, 128)
]
SCHEMES = [*((variant_id(variant), get(variant)) for variant in VARIANTS), *INT4]
EVERY = pytest.mark.parametrize("scheme", [made for _, made in SCHEMES], ids=[name for name, _ in SCHEMES])


def weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes; the largest value and the smallest may be anywhere."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, rows)[torch.randperm(rows, generator=generator)]
    return (torch.randn(rows, columns, generator=generator) * sizes[:, None]).to(BF16)


def shape(scheme: Scheme, units: int, groups: int) -> tuple[int, int]:
    """Some rows more than whole units, as many as the scheme allows."""
    unit = scheme.block(1)
    step = math.lcm(scheme.entry.multiples[0], 16 if scheme.layout.packing.startswith("opaque") else 1)
    more = (unit // 2) // step * step
    return weight_shape(scheme, max(step, units * unit + more), groups)


@EVERY
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(units=st.integers(0, 5), groups=st.integers(2, 5), block=st.integers(1, 4), seed=st.integers(0, 999))
def test_blocks_are_the_whole(scheme: Scheme, units: int, groups: int, block: int, seed: int) -> None:
    values = weight(*shape(scheme, units, groups if scheme.group_size else 16 * groups), seed)
    elements = block * scheme.block(1) * values.shape[1]
    reference = quantize_weight(values, scheme)
    made = quantize_tensor("w", values, BF16, scheme, "cpu", block=elements)
    assert_same(made.tensor, reference)
    whole = ErrorStats()
    whole.add(values, reference)
    assert (made.sqnr_db, made.max_abs_error) == (whole.sqnr_db, whole.largest)
    with threads(3) as pool:
        assert_same(quantize_tensor("w", values, BF16, scheme, "cpu", block=elements, pool=pool).tensor, reference)
    cut = blocks.cut(values, scheme, elements)
    assert (cut.step >= len(values)) == (
        units == 0 or scheme.rows.tile is None or block * scheme.block(1) >= len(values)
    )
    assert (cut.extremes is not None) == (scheme.rows.shared_scale and cut.step < len(values))
    tensor, error = begin(BlockQuantizer("cpu"), "w", values, BF16, scheme, elements)()
    assert_same(tensor, reference)
    assert (error.sqnr_db, error.largest) == (whole.sqnr_db, whole.largest)


STACKED = [(name, made) for name, made in SCHEMES if 3 in made.ranks]


@pytest.mark.parametrize("scheme", [made for _, made in STACKED], ids=[name for name, _ in STACKED])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_of_experts_are_the_whole(scheme: Scheme, block: int) -> None:
    rows, columns = weight_shape(scheme, 2 * scheme.block(1), 3 if scheme.group_size else 128)
    values = torch.stack([weight(rows, columns, seed) * 10.0**seed for seed in range(3)])
    reference = quantize_weight(values, scheme)
    elements = block * scheme.block(1) * columns
    assert_same(quantize_rows("w", values, BF16, scheme, "cpu", ErrorStats(), block=elements), reference)
    assert_same(begin(BlockQuantizer("cpu"), "w", values, BF16, scheme, elements)()[0], reference)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4wo", "float8dq_block", "int4wo-cpu-32", "int4wo-cuda-32"])
def test_the_unit_is_no_larger_than_it_has_to_be(name: str) -> None:
    """Half of it, and the scales or codes are elsewhere; or torchao does not take it."""
    scheme = dict(SCHEMES)[name]
    assert scheme.rows.tile is not None
    entry = dataclasses.replace(scheme.entry, multiples=(1, 1))
    halves = dataclasses.replace(scheme.rows, tile=scheme.rows.tile // 2)
    finer = dataclasses.replace(scheme, rows=halves, entry=entry)
    values = weight(*shape(scheme, 3, 4), 5)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        assembly = Assembly(quantize_weight(values.to("meta"), scheme), values.dtype, finer)
        rows = assembly.rows(0, len(values))
        for start in range(0, len(values), finer.block(1)):
            block = values[start : start + finer.block(1)]
            rows.put(quantize_weight(block, finer), start, len(block))
        assert_same(assembly.result(), quantize_weight(values, scheme))


@pytest.mark.parametrize("name", ["nvfp4wo", "nvfp4", "float8dq", "int8wo-per_tensor"])
def test_a_weight_of_zeros_is_repaired_once(name: str) -> None:
    scheme = dict(SCHEMES)[name]
    values = torch.zeros(*shape(scheme, 4, 32), dtype=BF16)
    for value in (0.0, 1e-40):  # the scale of the second is too small for some
        values[3, 3] = value
        error = ErrorStats()
        made = quantize_rows("w", values, BF16, scheme, "cpu", error, block=1)
        whole = quantize_tensor("w", values, BF16, scheme, "cpu", block=1 << 30)
        assert_same(made, whole.tensor)
        assert error.repaired <= (0 if name.startswith("int8") else 1)
        assert value or error.repaired == (0 if name.startswith("int8") else 1)
        assert made.dequantize().float().abs().max() <= value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["nvfp4wo", "float8dq", "mxfp8", "int4wo-cuda-32"])
def test_nan_and_infinity_anywhere_are_named(name: str, value: float) -> None:
    scheme = dict(SCHEMES)[name]
    values = weight(*shape(scheme, 3, 32), 1)
    values[-1, -1] = value
    with pytest.raises(QuantizeError, match="w holds NaN or infinity"):
        quantize_tensor("w", values, BF16, scheme, "cpu", block=1)


def test_several_blocks_at_a_time_change_nothing() -> None:
    """Figures and bits; and a block that fails, fails the weight, with nothing left under way."""
    scheme = schemes.get("mxfp8")
    values = weight(128 * 20, 4096, 3)
    alone = quantize_tensor("w", values, BF16, scheme, "cpu")
    with threads(4) as pool:
        made = quantize_tensor("w", values, BF16, scheme, "cpu", pool=pool)
        assert_same(made.tensor, alone.tensor)
        assert (made.sqnr_db, made.max_abs_error) == (alone.sqnr_db, alone.max_abs_error)
        # torchao takes no rows that are no whole groups
        with pytest.raises(QuantizeError, match=r"w \[2560, 4090\]: mxfp8 failed"):
            BlockQuantizer("cpu", pool=pool).start(WeightSlice("w", values[:, :4090].contiguous(), BF16, scheme), None)
        assert pool._work_queue.empty()
