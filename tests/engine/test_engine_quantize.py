"""One tensor: blocks of rows give the whole, errors are what they are said to be, bad weights are refused."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import assert_same
from helpers.one_tensor import quantize_rows, quantize_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization import quantize_

from aoconvert import schemes
from aoconvert.errors import QuantizeError
from aoconvert.schemes.apply import quantize_weight
from aoconvert.schemes.error_stats import ErrorStats, squares

CASES = [
    ("int8wo", None), ("int8wo", 32), ("int8dq", None), ("float8wo", None), ("float8wo", 64), ("float8wo_e5m2", None),
    ("int4dq", None), ("int4dq", 64), ("intx4wo", None), ("intx4wo", 32), ("intx2wo", 64), ("intx8wo", None),
]  # fmt: skip
PER_TENSOR = [("int8wo", {"granularity": "per_tensor"}), ("float8wo", {"granularity": "per_tensor"})]


def straight(weight: torch.Tensor, scheme: schemes.Scheme) -> torch.Tensor:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(linear, scheme.config)
    return linear.weight.detach()


@pytest.mark.parametrize(("name", "group"), CASES)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 4),
    block=st.integers(1, 6000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_blocks_of_rows_equal_the_whole(
    name: str, group: int | None, rows: int, groups: int, block: int, dtype: torch.dtype, seed: int
) -> None:
    scheme = schemes.get(name, group_size=group)
    weight = torch.randn(rows, 64 * groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    done = quantize_tensor("w", weight, torch.bfloat16, scheme, "cpu", block=block)
    assert_same(done.tensor, straight(weight.to(torch.bfloat16), scheme))


@pytest.mark.parametrize(("name", "options"), PER_TENSOR)
def test_one_scale_for_all(name: str, options: dict[str, str]) -> None:
    scheme = schemes.get(name, settings=options)
    weight = torch.randn(50, 64).bfloat16()
    assert not scheme.rows.by_tiles
    assert_same(quantize_tensor("w", weight, torch.bfloat16, scheme, "cpu", block=64).tensor, straight(weight, scheme))


@pytest.mark.parametrize(("name", "group"), CASES)
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_error_figures(name: str, group: int | None, block: int) -> None:
    """Against the source's own float32 weight, the cast to the base dtype counted in."""
    scheme = schemes.get(name, group_size=group)
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(3))
    done = quantize_tensor("w", weight, torch.bfloat16, scheme, "cpu", block=block)
    difference = weight.double() - straight(weight.bfloat16(), scheme).dequantize().double()
    assert done.sqnr_db == pytest.approx(20 * math.log10(weight.double().norm() / difference.norm()), abs=2e-3)
    assert done.max_abs_error == pytest.approx(difference.abs().max().item(), rel=1e-5)
    assert done.max_abs_error > 0


@pytest.mark.parametrize(("name", "group"), [("int8wo", None), ("float8wo", None), ("int4dq", 32)])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 80),
    groups=st.integers(1, 30),
    scale=st.sampled_from([1e-44, 1e-30, 1.0, 1e30, 3e38]),
    zeros=st.integers(0, 3),
    blocks=st.tuples(st.integers(1, 90_000), st.integers(1, 90_000)),
    seed=st.integers(0, 2**31),
)
def test_figures_do_not_depend_on_blocks_and_threads(
    name: str, group: int | None, rows: int, groups: int, scale: float, zeros: int, blocks: tuple[int, int], seed: int
) -> None:
    """As they are written, and for any float32: denormals, zeros, and what has no square in float32."""
    scheme = schemes.get(name, group_size=group)
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(rows, 32 * groups, generator=generator) - 0.5) * scale
    weight[:, :zeros] = 0
    seen = set()
    threads = torch.get_num_threads()
    try:
        for count, block in zip((1, 2), blocks, strict=True):
            torch.set_num_threads(count)
            done = quantize_tensor("w", weight, torch.float32, scheme, "cpu", block=block)
            seen.add((done.sqnr_db, done.max_abs_error))
    except QuantizeError as error:
        assert "turns it into NaN" in str(error)
        return
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200))
def test_squares_are_summed_in_float64(values: list[float]) -> None:
    assert float(squares(torch.tensor(values))) == pytest.approx(math.fsum(v * v for v in values), rel=1e-13, abs=0)


def test_a_weight_without_error_has_no_sqnr() -> None:
    done = quantize_tensor("w", torch.zeros(4, 32), torch.bfloat16, schemes.get("int8wo"), "cpu")
    assert (done.sqnr_db, done.max_abs_error) == (None, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int8wo", "float8wo", "int4dq"])
def test_nan_and_infinity_are_refused_by_name(name: str, value: float) -> None:
    weight = torch.ones(40, 64)
    weight[33, 5] = value
    with pytest.raises(QuantizeError, match=r"blocks\.3\.fc\.weight holds NaN or infinity"):
        quantize_tensor("blocks.3.fc.weight", weight, torch.bfloat16, schemes.get(name), "cpu", block=640)


@pytest.mark.parametrize("block", [None, 5 * 64])
@pytest.mark.parametrize("name", ["float8wo", "float8wo_e5m2", "float8dq_row"])
def test_rows_of_zeros_are_repaired_and_counted(name: str, block: int | None) -> None:
    """torchao gives them the scale 0, and codes that load as NaN; nothing else changes."""
    weight = torch.randn(48, 64)
    weight[7] = 0
    weight[30:33] = 0
    scheme = schemes.get(name)
    error = ErrorStats()
    ours = quantize_rows("fc.weight", weight, torch.bfloat16, scheme, "cpu", error, block=block)
    assert error.repaired == 4
    theirs = quantize_weight(weight.bfloat16(), scheme)
    values = ours.dequantize()
    assert values.isfinite().all()
    zero = (weight == 0).all(1)
    assert not values[zero].any()
    assert torch.equal(ours.scale[~zero], theirs.scale[~zero])
    assert torch.equal(ours.qdata[~zero].view(torch.uint8), theirs.qdata[~zero].view(torch.uint8))


@pytest.mark.parametrize(("name", "settings"), [("int8wo", {}), ("float8wo", {}), ("int8dq", {})])
@pytest.mark.parametrize("block", [None, 3 * 32])
def test_stacked_experts_are_the_whole(name: str, settings: dict[str, str], block: int | None) -> None:
    weight = torch.randn(3, 10, 32)
    scheme = schemes.get(name, settings=settings)
    ours = quantize_rows("experts.up_proj", weight, torch.bfloat16, scheme, "cpu", ErrorStats(), block=block)
    assert_same(ours, quantize_weight(weight.bfloat16(), scheme))


def test_overflow_in_the_cast_is_refused() -> None:
    """1e6 is finite in float32 and infinite in float16."""
    with pytest.raises(QuantizeError, match="fc overflows float16"):
        quantize_tensor("fc", torch.full((4, 32), 1e6), torch.float16, schemes.get("int8wo"), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("name", "group"), CASES)
def test_cuda_gives_what_quantize_gives_on_cuda(name: str, group: int | None) -> None:
    scheme = schemes.get(name, group_size=group)
    weight = torch.randn(100, 256).bfloat16()
    done = quantize_tensor("w", weight, torch.bfloat16, scheme, "cuda", block=2560)
    assert done.tensor.device.type == "cpu"
    assert_same(done.tensor, straight(weight.cuda(), scheme).cpu())
