"""int4 for a device that is not here: bit for bit what torchao's own code makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.bits import assert_same
from helpers.torchao_int4 import for_cuda, for_xpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.core.config import config_from_dict, config_to_dict
from torchao.prototype.quantization.int4 import Int4OpaqueTensor, PrototypeInt4WeightOnlyConfig
from torchao.quantization import quant_primitives, quantize_
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

from aoconvert.errors import PlanError, UsageError
from aoconvert.schemes import cpu_packing, int4
from aoconvert.schemes.tensors import dequantize, take_apart

MADE = (("cuda", "tinygemm"), ("cuda", "hqq"), ("cpu", "tinygemm"), ("cpu", "hqq"), ("xpu", "tinygemm"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def normal(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def torchao(weight: torch.Tensor, group_size: int, device: str, algorithm: str = "tinygemm") -> Any:
    """What torchao makes of the weight; the weight itself where it declines."""
    if device == "cpu":
        linear = torch.nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        config = PrototypeInt4WeightOnlyConfig(group_size, Int4ChooseQParamsAlgorithm(algorithm), False)
        quantize_(linear, config)
        return linear.weight.detach()
    if weight.shape[-1] % group_size:
        return weight  # as _int4_weight_only_quantize_tensor does
    return for_cuda(weight, group_size, algorithm) if device == "cuda" else for_xpu(weight, group_size)


@pytest.mark.parametrize(("device", "algorithm"), MADE)
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (48, 320), (16, 1088)])
def test_it_is_what_torchaos_own_code_makes(rows: int, columns: int, device: str, algorithm: str) -> None:
    weight = normal(rows, columns)
    weight[3], weight[4, :64], weight[5, 7] = 0.0, 0.25, -30.0
    made = int4.quantize(weight, group_size=64, device=device, algorithm=algorithm)
    assert_same(made, torchao(weight, 64, device, algorithm))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["cuda", "xpu"]),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([32, 64, 128, 256]),
    st.data(),
)
def test_odd_shapes_are_filled_up_as_torchao_does(device: str, rows: int, groups: int, size: int, data: Any) -> None:
    dtype = data.draw(st.sampled_from(DTYPES[:2])) if device == "xpu" else torch.bfloat16
    columns = min(groups * size, 2048 // size * size)
    weight = normal(rows, columns, dtype, seed=rows) * data.draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e3]))
    assert_same(int4.quantize(weight, group_size=size, device=device), torchao(weight, size, device))


@pytest.mark.parametrize("columns", [64, 320])  # one group a row has other strides
@pytest.mark.parametrize(("device", "algorithm"), MADE)
def test_on_meta_it_has_the_class_and_shapes_of_the_real_one(device: str, algorithm: str, columns: int) -> None:
    for dtype in DTYPES if device == "cpu" else DTYPES[:1]:
        weight = normal(48, columns, dtype)
        real: Any = int4.quantize(weight, group_size=64, device=device, algorithm=algorithm)
        meta: Any = int4.quantize(weight.to("meta"), group_size=64, device=device, algorithm=algorithm)
        assert type(meta) is type(real)
        assert (meta.is_meta, meta.dtype, meta.__tensor_flatten__()) == (True, real.dtype, real.__tensor_flatten__())
        for name in real.__tensor_flatten__()[0]:
            one, other = getattr(meta, name), getattr(real, name)
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_the_plain_layout_is_planned_anywhere_and_made_with_mslk_only() -> None:
    meta: Any = int4.quantize(torch.empty(8, 128, dtype=torch.bfloat16, device="meta"), group_size=64, device="plain")
    assert type(meta).__name__ == "Int4Tensor"
    assert (meta.qdata.shape, meta.scale.shape, meta.zero_point.shape) == ((8, 64), (2, 8), (2, 8))
    if int4.unavailable("plain") is None:
        made: Any = int4.quantize(normal(8, 128), group_size=64, device="plain")
        assert made.__tensor_flatten__() == meta.__tensor_flatten__()
    else:
        with pytest.raises(PlanError, match="mslk"):
            int4.quantize(normal(8, 128), group_size=64, device="plain")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["cuda", "cpu", "xpu"]),
    st.sampled_from(
        [(8,), (0, 64), (16, 0), (1, 64), (8, 32), (16, 64), (16, 96), (17, 128), (32, 100), (32, 1), (48, 128)]
    ),
    st.sampled_from([*DTYPES, torch.int8, torch.float64]),
    st.sampled_from([32, 64, 128]),
)
def test_a_weight_is_taken_where_torchao_takes_it(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, size: int
) -> None:
    weight = torch.linspace(-2, 3, torch.Size(shape).numel()).reshape(shape).to(dtype)
    try:
        taken = type(torchao(weight, size, device)) is not torch.Tensor
    except (AssertionError, RuntimeError, TypeError, ValueError, IndexError):
        taken = False
    reason = int4.blocker(shape, dtype, group_size=size, device=device)
    assert (reason is None) == (taken and all(shape))
    if reason is None:
        made = int4.quantize(weight, group_size=size, device=device)
        assert torch.isfinite(dequantize(made)).all()


def test_stacked_experts_are_not_taken() -> None:
    # torchao packs them for CUDA; no loader and no kernel of int4 takes them
    assert for_cuda(torch.stack([normal(8, 64)] * 2), 64).qdata.dim() == 5
    for device in int4.DEVICES:
        assert int4.blocker((2, 16, 64), torch.bfloat16, group_size=64, device=device) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 48, 64, 112])
def test_what_the_cpu_computes_with_is_what_dequantizing_gives(rows: int, dtype: torch.dtype) -> None:
    made = int4.quantize(normal(rows, 128, dtype), group_size=32, device="cpu")
    computed = torch.nn.functional.linear(torch.eye(128, dtype=dtype), made).t()
    # the kernel multiplies and adds in one step, in float32
    torch.testing.assert_close(computed, dequantize(made).to(dtype), rtol=0, atol=5e-7 * (dtype == torch.float32))


def test_dequantizing_is_torchaos_formula_for_the_other_layouts() -> None:
    weight = normal(16, 128)
    for device in ("cuda", "xpu"):
        made = int4.quantize(weight, group_size=32, device=device)
        parts = take_apart(made)
        codes, scale, zero = parts.codes.int(), parts.scale.contiguous(), parts.zero.contiguous()
        if device == "cuda":
            expected = quant_primitives._dequantize_affine_tinygemm(codes, [1, 32], scale, zero, torch.int32, 0, 15)
        else:
            expected = quant_primitives.dequantize_affine(
                codes, [1, 32], scale, zero.int(), torch.int32, 0, 15, output_dtype=torch.float32
            )
        assert torch.equal(dequantize(made), expected)
        assert (dequantize(made) - weight.float()).norm() < 0.1 * weight.float().norm()


def test_codes_of_the_plain_layout_are_signed() -> None:
    from torchao.quantization import Int4Tensor

    codes = torch.tensor([[-8, 7, -1, 0] * 8], dtype=torch.int8)
    packed = codes[:, ::2] & 15 | codes[:, 1::2] << 4  # mslk.quantize.shuffle.pack_int4
    made = Int4Tensor(packed, torch.tensor([[0.5]]), torch.tensor([[2.0]]), [1, 32], torch.Size((1, 32)))
    assert torch.equal(dequantize(made), codes * 0.5 + 2.0)


def test_a_weight_of_another_cpu_layout_is_read_in_that_layout() -> None:
    made: Any = int4.quantize(normal(112, 64), group_size=32, device="cpu")
    codes = take_apart(made).codes
    for layout in cpu_packing.LAYOUTS:
        other = Int4OpaqueTensor(cpu_packing.pack(codes, layout), made.scale_and_zero, made.block_size, made.shape)
        assert torch.equal(dequantize(other, layout), dequantize(made))
        assert torch.equal(dequantize(other), dequantize(made)) == int4.fits_machine(layout)


def test_the_packing_says_the_cpus_layout() -> None:
    assert int4.machine_layout() in cpu_packing.LAYOUTS
    assert int4.cpu_layout(int4.machine_packing()) == int4.machine_layout()
    assert int4.cpu_layout(f"plain+{int4.machine_packing()}") == int4.machine_layout()
    assert int4.cpu_layout("plain+tile_packed_to_4d") is None
    assert not int4.fits_machine(cpu_packing.UNKNOWN)


@pytest.mark.parametrize("device", int4.DEVICES)
def test_the_config_can_be_read_back(device: str) -> None:
    config = int4.config(64, device)
    assert config_from_dict(config_to_dict(config)) == config
    with pytest.raises(UsageError, match="group size 48"):
        int4.config(48, device)


@pytest.mark.parametrize("device", ["xpu", "plain"])
def test_hqq_is_for_cuda_and_cpu(device: str) -> None:
    with pytest.raises(UsageError, match="no hqq"):
        int4.config(64, device, "hqq")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 128), (5, 64), (131, 1088), (1024, 4096)])
def test_a_gpu_makes_the_same_tensor_with_torchaos_own_code(shape: tuple[int, int]) -> None:
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an NVIDIA GPU of capability 8.0")
    weight = normal(*shape)
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.cuda(), requires_grad=False)
    quantize_(linear, int4.config(64, "cuda"))
    made = int4.quantize(weight, group_size=64, device="cuda")
    assert_same(made, linear.weight.detach().cpu())
    assert_same(int4.quantize(weight.cuda(), group_size=64, device="cuda").cpu(), made)
    inputs = torch.eye(shape[1], dtype=torch.bfloat16, device="cuda")
    computed = torch.nn.functional.linear(inputs, made.cuda()).t().cpu()
    # the kernel computes in bfloat16
    torch.testing.assert_close(computed.float(), dequantize(made), rtol=2**-7, atol=2**-5)
