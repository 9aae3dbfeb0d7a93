"""The pieces in which a tensor passes through the engine."""

from __future__ import annotations

import itertools
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aoconvert import schemes
from aoconvert.planning import slices as module
from aoconvert.planning.slices import is_streamed, slices
from aoconvert.planning.types import Action, TensorPlan
from aoconvert.schemes import Scheme


def plan(shape: tuple[int, ...], action: Action, scheme: Scheme | None, itemsize: int = 2) -> TensorPlan:
    size = prod(shape) * itemsize
    return TensorPlan("w", shape, "bfloat16", "bfloat16", action, None, True, True, False, size, size, scheme=scheme)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5000), max_size=3).map(tuple),
    action=st.sampled_from(["quantize", "cast", "keep"]),
    limit=st.integers(1, 1 << 20),
)
def test_pieces_cover_the_rows_in_order(shape: tuple[int, ...], action: Action, limit: int) -> None:
    if action == "quantize" and len(shape) < 2:
        return
    tensor = plan(shape, action, schemes.get("int8wo") if action == "quantize" else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE_BYTES", limit)
        ranges = slices(tensor)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == (shape[0] if shape else 1)
    assert all(first[1] == second[0] for first, second in itertools.pairwise(ranges))
    if len(ranges) > 1:
        row = prod(shape[1:]) * 2
        assert all(start < stop for start, stop in ranges)
        assert max(stop - start for start, stop in ranges) == 1 or (ranges[0][1] - ranges[0][0]) * row <= limit


def test_what_must_stay_whole_stays_whole() -> None:
    tensor = plan((1 << 16, 1 << 12), "quantize", schemes.get("int8wo"))
    assert len(slices(tensor)) == 16
    assert is_streamed(tensor)
    experts = plan((64, 1 << 10, 1 << 12), "quantize", schemes.get("int8wo"))
    assert len(slices(experts)) == 16
    hqq = schemes.get("intx4wo", settings={"intx_choose_qparams_algorithm": "hqq_scale_only"})
    assert not hqq.rows.by_tiles
    whole = plan((1 << 16, 1 << 12), "quantize", hqq)
    assert slices(whole) == [(0, 1 << 16)]
    assert not is_streamed(whole)
    assert slices(plan((), "keep", None)) == [(0, 1)]
    assert slices(plan((1, 1 << 30), "keep", None)) == [(0, 1)]
