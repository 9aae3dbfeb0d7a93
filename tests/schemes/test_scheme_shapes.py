from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_table import VARIANTS, get, quantize, variant_id

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


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(VARIANTS),
    st.one_of(st.integers(1, 8), st.sampled_from([17, 32])),
    COLUMNS,
    st.sampled_from(DTYPES),
)
def test_agrees_with_torchao(variant: Any, rows: int, columns: int, dtype: torch.dtype) -> None:
    made = get(variant)
    assert (schemes.blocker((rows, columns), dtype, made) is None) == torchao_takes((rows, columns), dtype, made.config)


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 96), (96, 1), (2, 1), (7, 13), (4, 96), (3, 35), (2, 3, 96), (2, 3, 1), (1, 1, 1)]
)
def test_agrees_with_torchao_at_the_corners(variant: Any, shape: tuple[int, ...]) -> None:
    made = get(variant)
    assert (schemes.blocker(shape, torch.bfloat16, made) is None) == torchao_takes(shape, torch.bfloat16, made.config)


def test_reasons() -> None:
    intx = schemes.get("intx4wo", group_size=32)
    assert schemes.blocker((8, 100), torch.bfloat16, intx) == "in_features 100 is not a multiple of group size 32"
    assert schemes.blocker((8, 64), torch.bfloat16, intx) is None
    assert "3 dimensions" in (schemes.blocker((2, 8, 64), torch.bfloat16, intx) or "")
    assert "1 dimensions" in (schemes.blocker((64,), torch.bfloat16, schemes.get("int8wo")) or "")
    assert "4 dimensions" in (schemes.blocker((8, 64, 3, 3), torch.bfloat16, schemes.get("int8wo")) or "")
    assert "in_features 1" in (schemes.blocker((64, 1), torch.bfloat16, schemes.get("int8wo")) or "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    for name in ("int8wo", "float8wo", "intx4wo"):
        reason = schemes.blocker((8, 64), dtype, schemes.get(name))
        assert reason == f"dtype {str(dtype).removeprefix('torch.')} is none of bfloat16, float16, float32"


@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (0, 0)])
def test_an_empty_weight_is_refused(shape: tuple[int, int]) -> None:
    for name in ("int8wo", "float8wo", "intx4wo"):
        assert schemes.blocker(shape, torch.bfloat16, schemes.get(name)) == "it is empty"
