"""Zero points of the two kinds: carried exactly, or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aoconvert.rewriting.int4_weights import CannotCarry, carry, pack
from aoconvert.schemes import int4
from aoconvert.schemes.int4_parts import Parts
from aoconvert.schemes.tensors import dequantize, take_apart


def exact(rows: int, groups: int, seed: int) -> Parts:
    """Whole zero points, and scales of so few bits that every product fits bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups * 32), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 17, (rows, groups), generator=generator) * 2.0 ** torch.randint(
        -20, 3, (rows, groups), generator=generator
    )
    zero = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.int8)
    return Parts(codes, scale.to(torch.bfloat16), zero, True, 32)


def equal(one: Parts, other: Parts) -> bool:
    names = ("codes", "scale", "zero")
    same = (torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return all(same) and (one.whole, one.group_size) == (other.whole, other.group_size)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from(["cpu", "cuda"]), st.integers(0, 2**30))
def test_exact_zero_points_go_there_and_back(tall: int, groups: int, device: str, seed: int) -> None:
    parts = exact(16 * tall, groups, seed)
    here = pack(parts, "xpu", "tinygemm")
    there = pack(carry(parts, device), device, "tinygemm")
    assert torch.equal(dequantize(here), dequantize(there))
    assert equal(take_apart(pack(carry(take_apart(there), "xpu"), "xpu", "tinygemm")), parts)


@pytest.mark.parametrize("algorithm", int4.ALGORITHMS)
@pytest.mark.parametrize("seed", range(4))
def test_a_weight_taken_apart_and_packed_is_what_it_was(algorithm: str, seed: int) -> None:
    weight = torch.randn(20, 320, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    made = int4.quantize(weight, group_size=64, device="cuda", algorithm=algorithm)
    again = pack(take_apart(made), "cuda", algorithm)
    assert again.__tensor_flatten__() == made.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in ("qdata", "scale_and_zero"):
        assert torch.equal(getattr(again, name), getattr(made, name))


def test_what_does_not_fit_is_refused_with_its_place() -> None:
    parts = exact(16, 2, 0)
    parts.scale[3, 1] = 1 + 2**-7  # all eight bits of bfloat16: three steps of it need more
    parts.zero[3, 1] = 5
    with pytest.raises(
        CannotCarry, match=r"row 3, group 1 has a zero point that bfloat16, .* cannot represent exactly"
    ):
        carry(parts, "cuda")
    float_zeros = carry(exact(16, 2, 0), "cpu")
    float_zeros.zero[7, 0] *= 1.0625
    float_zeros.zero[7, 0] += 0.3
    with pytest.raises(CannotCarry, match="row 7, group 0 has a zero point that is not a whole number of steps"):
        carry(float_zeros, "xpu")


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float16, "cuda"), (torch.float32, "cuda"), (torch.float32, "xpu")]
)
def test_scales_keep_their_dtype(dtype: torch.dtype, device: str) -> None:
    made = int4.quantize(torch.randn(16, 64, dtype=dtype), group_size=32, device="cpu")
    with pytest.raises(CannotCarry, match=str(dtype).removeprefix("torch.")):
        carry(take_apart(made), device)
