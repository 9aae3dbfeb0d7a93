from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_table import VARIANTS, get, parameters, quantize, variant_id

from aoconvert import schemes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = st.one_of(st.integers(1, 12), st.sampled_from([13, 31, 97, 101]), st.integers(1, 12).map(lambda n: 16 * n))


def torchao_takes(shape: tuple[int, ...], dtype: torch.dtype, config: Any) -> bool:
    values = torch.linspace(-2, 3, torch.Size(shape).numel()).reshape(shape).to(dtype)
    try:
        made = quantize(values, config)
    except Exception:
        return False
    return type(made) is not torch.nn.Parameter and type(made) is not torch.Tensor


def cannot_run(made: schemes.Scheme) -> bool:
    """What torchao quantizes and cannot run in one shape, which has a test of its own."""
    return made.format.granularity == "per tensor" and made.layout.min_capability is not None


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([variant for variant in VARIANTS if not cannot_run(get(variant))]),
    st.one_of(st.integers(1, 8), st.sampled_from([16, 17, 32, 48, 128])),
    COLUMNS,
    st.sampled_from(DTYPES),
)
def test_agrees_with_torchao(variant: Any, rows: int, columns: int, dtype: torch.dtype) -> None:
    made = get(variant)
    assert (schemes.blocker((rows, columns), dtype, made) is None) == torchao_takes((rows, columns), dtype, made.config)


@pytest.mark.parametrize("variant", parameters())
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1), (1, 96), (96, 1), (2, 1), (7, 13), (4, 96), (3, 35), (16, 96), (17, 96), (16, 97), (128, 384)],
        *[(2, 3, 96), (2, 3, 1), (1, 1, 1), (1, 16, 32), (2, 128, 128)],
    ],
)
def test_agrees_with_torchao_at_the_corners(variant: Any, shape: tuple[int, ...]) -> None:
    made = get(variant)
    takes = torchao_takes(shape, torch.bfloat16, made.config)
    blocked = schemes.blocker(shape, torch.bfloat16, made)
    if len(shape) == 3 and made.ranks == (2,):
        # torchao may quantize experts and then not be able to take one out: see test_one_expert_can_be_taken_out
        assert blocked is not None
    else:
        assert (blocked is None) == takes


def without_experts(variant: Any) -> bool:
    return get(variant).ranks == (2,) and get(variant).entry.tensor_class.name in (
        "MXTensor",
        "Float8Tensor",
        "Int8Tensor",
    )


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if not without_experts(v) and 3 in get(v).ranks], ids=variant_id
)
def test_one_expert_can_be_taken_out(variant: Any) -> None:
    made = get(variant)
    experts = torch.randn(3, 128, 240 if made.group_size == 3 else 256, generator=torch.Generator().manual_seed(1))
    experts = experts.bfloat16()
    assert schemes.blocker(tuple(experts.shape), experts.dtype, made) is None
    whole = quantize(experts, made.config)
    for index in range(3):
        one, alone = whole[index], quantize(experts[index].clone(), made.config)
        assert type(one) is type(alone)
        assert torch.equal(one.dequantize(), alone.dequantize())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if without_experts(v)], ids=variant_id)
def test_no_expert_can_be_taken_out_of_those_without_that_rank(variant: Any) -> None:
    whole = quantize(torch.randn(3, 128, 256).bfloat16(), get(variant).config)
    with pytest.raises((IndexError, AssertionError)):
        whole[1].dequantize()


def test_experts_must_not_share_a_tile_of_scales() -> None:
    """torchao takes this, and gives the second expert the scales of other rows."""
    made = schemes.get("nvfp4", settings={"use_dynamic_per_tensor_scale": "false"})
    experts = torch.randn(2, 80, 64).bfloat16() * torch.logspace(-2, 2, 160).reshape(2, 80, 1)
    experts = experts.bfloat16()
    whole = quantize(experts, made.config)
    assert not torch.equal(whole[1].dequantize(), quantize(experts[1].clone(), made.config).dequantize())
    assert "128" in (schemes.blocker((2, 80, 64), torch.bfloat16, made) or "")
    assert schemes.blocker((1, 80, 64), torch.bfloat16, made) is None


@pytest.mark.parametrize("shape", [(128, 128), (128, 256), (256, 128), (16, 16)])
def test_float8_of_128_by_128_with_one_scale_cannot_run(shape: tuple[int, int]) -> None:
    made = schemes.get("float8dq")
    weight = quantize(torch.randn(shape).bfloat16(), made.config)
    runs = True
    try:
        torch.nn.functional.linear(torch.randn(4, shape[1]).bfloat16(), weight)
    except AssertionError:
        runs = False
    assert (schemes.blocker(shape, torch.bfloat16, made) is None) == runs
    assert runs == (shape != (128, 128))
    assert schemes.blocker((128, 128), torch.bfloat16, schemes.get("float8dq_row")) is None


def test_reasons() -> None:
    float8 = schemes.get("float8dq_row")
    assert schemes.blocker((24, 64), torch.bfloat16, float8) == "out_features 24 is not a multiple of 16"
    assert schemes.blocker((16, 72), torch.bfloat16, float8) == "in_features 72 is not a multiple of 16"
    assert schemes.blocker((16, 64), torch.float32, float8) == "dtype float32 is not bfloat16"
    assert schemes.blocker((16, 48), torch.bfloat16, schemes.get("mxfp4")) is not None
    cpu, cuda = schemes.get("int4wo"), schemes.get("int4wo", layout_device="cuda")
    assert "multiple of 16" in (schemes.blocker((24, 128), torch.bfloat16, cpu) or "")
    assert schemes.blocker((24, 128), torch.bfloat16, cuda) is None
    assert "bfloat16" in (schemes.blocker((16, 128), torch.float32, cuda) or "")
    assert "group size 128" in (schemes.blocker((16, 64), torch.bfloat16, cuda) or "")
    intx = schemes.get("intx4wo", group_size=32)
    assert schemes.blocker((8, 100), torch.bfloat16, intx) == "in_features 100 is not a multiple of group size 32"
    assert schemes.blocker((8, 64), torch.bfloat16, intx) is None
    assert "a stack of matrices" in (schemes.blocker((2, 8, 64), torch.bfloat16, intx) or "")
    assert "1 dimensions" in (schemes.blocker((64,), torch.bfloat16, schemes.get("int8wo")) or "")
    assert "4 dimensions" in (schemes.blocker((8, 64, 3, 3), torch.bfloat16, schemes.get("int8wo")) or "")
    assert "in_features 1" in (schemes.blocker((64, 1), torch.bfloat16, schemes.get("int8wo")) or "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    assert "none of bfloat16, float32" in (schemes.blocker((16, 64), dtype, schemes.get("nvfp4wo")) or "")
    for name in ("int8wo", "float8wo", "intx4wo"):
        reason = schemes.blocker((8, 64), dtype, schemes.get(name))
        assert reason == f"dtype {str(dtype).removeprefix('torch.')} is none of bfloat16, float16, float32"


@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (0, 0)])
def test_an_empty_weight_is_refused(shape: tuple[int, int]) -> None:
    for name in ("int8wo", "float8wo", "intx4wo"):
        assert schemes.blocker(shape, torch.bfloat16, schemes.get(name)) == "it is empty"
