"""Weights whose torchao handler asks what the machine has, although their arithmetic is plain torch.

What torchao 0.18's handlers of these configs do after that question, through the same functions of torchao. Source:
``_float8_dynamic_activation_float8_weight_quantize_tensor`` and ``_float8_weight_only_quant_tensor`` in
``torchao/quantization/quant_api.py``, and ``_nvfp4_inference_linear_transform`` in
``torchao/prototype/mx_formats/inference_workflow.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def quantizer(config: Any) -> Callable[[torch.Tensor, Any], torch.Tensor] | None:
    """What to call in place of the handler of this config, ``None`` where the handler itself serves."""
    return _QUANTIZERS.get(type(config).__name__)


def _float8_dynamic(weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Float8 weights that will multiply float8 activations.

    Where mslk is installed, the handler takes its kernel for rows; this is torch's arithmetic on every machine.

    Raises:
        ValueError: rows and another dtype than bfloat16.
    """
    import torch
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    activation, granularity = config.granularity
    if weight.shape[-1] % 16 or weight.shape[-2] % 16:
        return weight
    if isinstance(granularity, PerRow) and weight.dtype != torch.bfloat16:
        raise ValueError(f"float8 per row supports only bfloat16 weights, not {weight.dtype}")
    kwargs = QuantizeTensorToFloat8Kwargs(
        config.activation_dtype,
        activation,
        hp_value_lb=config.activation_value_lb,
        hp_value_ub=config.activation_value_ub,
        kernel_preference=config.kernel_preference,
    )
    made: Any = Float8Tensor.from_hp(
        weight,
        float8_dtype=config.weight_dtype,
        granularity=granularity,
        mm_config=config.mm_config,
        kernel_preference=KernelPreference.TORCH,
        act_quant_kwargs=kwargs,
    )
    made.kernel_preference = config.kernel_preference
    tensor: torch.Tensor = made
    return tensor


def _float8_weight_only(weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Float8 weights.

    Where mslk is installed and an NVIDIA GPU from Hopper on is here, ``from_hp`` takes mslk's kernel for rows, even for
    weights in host memory, and always on the current GPU; it rounds otherwise. This is torch's arithmetic everywhere.
    """
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.common import KernelPreference

    made: Any = Float8Tensor.from_hp(
        weight,
        float8_dtype=config.weight_dtype,
        granularity=config.granularity,
        kernel_preference=KernelPreference.TORCH,
    )
    made.kernel_preference = KernelPreference.AUTO
    tensor: torch.Tensor = made
    return tensor


def _nvfp4_dynamic(weight: torch.Tensor, config: Any) -> torch.Tensor:
    """NVFP4 weights that will multiply NVFP4 activations; stacked experts have a scale each.

    Raises:
        ValueError: in_features or out_features that are no multiple of 16.
    """
    from torchao.prototype.mx_formats.nvfp4_tensor import (
        NVFP4Tensor,
        QuantizeTensorToNVFP4Kwargs,
        per_tensor_amax_to_scale,
    )

    if weight.shape[-1] % 16 or weight.shape[-2] % 16:
        raise ValueError(f"NVFP4 needs multiples of 16 in both dimensions, not {tuple(weight.shape)}")
    scale = None
    if config.use_dynamic_per_tensor_scale:
        amax = weight.abs().amax() if weight.dim() == 2 else weight.abs().amax(dim=(1, 2), keepdim=True)
        scale = per_tensor_amax_to_scale(amax)
    kwargs = QuantizeTensorToNVFP4Kwargs(
        use_dynamic_per_tensor_scale=config.use_dynamic_per_tensor_scale,
        use_triton_kernel=config.use_triton_kernel,
        is_swizzled_scales=True,
    )
    made: Any = NVFP4Tensor.to_nvfp4(
        weight,
        per_tensor_scale=scale,
        is_swizzled_scales=True,
        use_triton_kernel=False,
        act_quant_kwargs=kwargs,
    )
    made.use_triton_kernel = config.use_triton_kernel
    tensor: torch.Tensor = made
    return tensor


_QUANTIZERS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "Float8DynamicActivationFloat8WeightConfig": _float8_dynamic,
    "Float8WeightOnlyConfig": _float8_weight_only,
    "NVFP4DynamicActivationNVFP4WeightConfig": _nvfp4_dynamic,
}
