"""A weight that torchao quantized, in the words of the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aoconvert.formats.dtypes import dtype_name
from aoconvert.schemes.table.entry import TOKEN

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

    from aoconvert.schemes.table import SchemeEntry

_ELEMENTS = {"float4_e2m1fn_x2": "float4_e2m1", "fp6_e2m3": "float6_e2m3", "fp6_e3m2": "float6_e3m2"}


def granularity_of(sample: Any) -> tuple[int | None, str]:
    """Group size (``None``: no groups) and what shares a scale, of a quantized matrix."""
    columns = sample.shape[1]
    # MXTensor and NVFP4Tensor hold the length of a group, the others (rows, columns) of a block
    block = sample.block_size
    block_rows, block_columns = (1, block) if isinstance(block, int) else block
    if block_rows == 1:
        if block_columns == columns:
            return None, "per row"
        also = ", and per tensor" if getattr(sample, "per_tensor_scale", None) is not None else ""
        return block_columns, f"per group of {block_columns}{also}"
    if "PerBlock" in type(getattr(sample.act_quant_kwargs, "granularity", None)).__name__:
        return None, f"per block of {block_rows}x{block_columns}"
    return None, "per tensor"


def activation(sample: Any) -> str | None:
    """What the quantized weight will do to its input."""
    if getattr(sample, "activation_quantization", None) is not None:
        return "int8 per token, asymmetric, dynamic"  # the one kind that IntxUnpackedToInt8Tensor knows
    if (kwargs := getattr(sample, "act_quant_kwargs", None)) is None:
        return None
    kind = type(kwargs).__name__
    if kind == "QuantizeTensorToMXKwargs":
        element = dtype_name(kwargs.elem_dtype)
        return f"{_ELEMENTS.get(element, element)} per group of {kwargs.block_size}, dynamic"
    if kind == "QuantizeTensorToNVFP4Kwargs":
        return "float4_e2m1 per group of 16, dynamic"
    per = {"PerTensor": "per tensor", "PerRow": "per token"}.get(type(kwargs.granularity).__name__)
    if kind == "QuantizeTensorToFloat8Kwargs":
        dtype = dtype_name(kwargs.float8_dtype)
        return f"{dtype} {per or f'per group of {kwargs.granularity.block_size[-1]}'}, dynamic"
    return f"int8 {per}, {'asymmetric, ' if kwargs.mapping_type.name == 'ASYMMETRIC' else ''}dynamic"


def min_torchao(entry: SchemeEntry, config: AOBaseConfig, group_size: int | None) -> str:
    """Files of torchao 0.18 were loaded and run in 0.13, 0.14.1, 0.15, 0.16 and 0.17.

    Before a class computes right with them, it loads groups but fails in forward, and silently takes asymmetric
    activations for symmetric.
    """
    asymmetric = getattr(getattr(config, "act_mapping_type", None), "name", None) == "ASYMMETRIC"
    since = entry.tensor_class.groups_since
    return since if since and (group_size is not None or asymmetric) else entry.min_torchao


def notes(entry: SchemeEntry, bits: float, granularity: str, *, bounded: bool = False) -> tuple[str, ...]:
    """What whoever chooses it should know first; ``bounded``: the scale of the activations has a least value."""
    found = []
    if entry.value_bits < round(bits):
        found.append(f"stores each {entry.value_bits}-bit value in one byte: the file is not smaller than int8wo's")
        if granularity == "per row":
            found.append("one scale per row: a group size of 32 to 128 is more accurate")
    if entry.fails_on_single_row:
        found.append("fails in layers that see a single row of input (modulation, timestep): do not quantize those")
    if entry.device != "any":
        found.append(f"runs only on {entry.device} devices")
    if entry.min_capability is not None:
        found.append(f"on CUDA it needs compute capability {capability(entry.min_capability)} or higher")
    if entry.zero_input == TOKEN and not bounded:
        found.append(
            "torchao 0.18 turns a row of zeros in a layer's input (padded text) into NaN; --set "
            "activation_value_lb=1e-12 avoids that"
        )
    return tuple(found)


def capability(version: tuple[int, int]) -> str:
    """A compute capability as people write it: ``8.9``."""
    return ".".join(map(str, version))
