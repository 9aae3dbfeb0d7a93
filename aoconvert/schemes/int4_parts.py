"""What a 4-bit weight of torchao consists of, whatever its layout: codes, scales and zero points. Taken apart, packed.

Two kinds of zero points exist. tinygemm's kernels (CUDA, CPU) and mslk's add the value of code 8:
``(code - 8) * scale + zero``, as ``_dequantize_affine_tinygemm`` of torchao has it. oneDNN's (XPU) subtract a whole
number, the code of 0: ``(code - zero) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from aoconvert.errors import PlanError
from aoconvert.schemes import cpu_packing, tile_packing

if TYPE_CHECKING:
    import torch

INNER_K_TILES = 8  # torchao's, fixed
COLUMNS = 1024  # in_features of the layout for CUDA are filled up to a multiple of it


@dataclass(frozen=True)
class Parts:
    """A weight of shape (out_features, in_features), not filled up.

    Attributes:
        codes: uint8, 0 to 15, one an element.
        scale: (out_features, groups).
        zero: (out_features, groups): the value of code 8, or the code of 0 (int8).
        whole: the zero points are codes.
        group_size: in_features that share a scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    whole: bool
    group_size: int


def of_tiles(tensor: Any, cpu_layout: str | None) -> Parts:
    """The parts of a weight that is packed for CUDA."""
    rows, columns = tensor.shape
    size = _group_size(tensor)
    codes = tile_packing.unpack(tensor.qdata, INNER_K_TILES)[:rows, :columns]
    scale, zero = _both(tensor.scale_and_zero[: columns // size, :rows])
    return Parts(codes.contiguous(), scale, zero, False, size)


def of_opaque(tensor: Any, cpu_layout: str | None) -> Parts:
    """The parts of a weight that is packed for the CPU, by default in this machine's layout.

    Raises:
        PlanError: a layout that is not known here.
    """
    if (layout := cpu_layout or cpu_packing.machine_layout()) not in cpu_packing.LAYOUTS:
        raise PlanError([f"{layout!r} is not a known int4 layout for the CPU"], hint="upgrade aoconvert")
    scale, zero = _both(tensor.scale_and_zero)
    return Parts(cpu_packing.unpack(tensor.qdata, layout).contiguous(), scale, zero, False, _group_size(tensor))


def of_plain_int32(tensor: Any, cpu_layout: str | None) -> Parts:
    """The parts of a weight for Intel GPUs."""
    return Parts(_halves(tensor), tensor.scale.t(), tensor.zero_point.t(), True, _group_size(tensor))


def of_plain(tensor: Any, cpu_layout: str | None) -> Parts:
    """The parts of a weight for mslk, whose codes are signed: two's complement."""
    return Parts(_halves(tensor) ^ 8, tensor.scale.t(), tensor.zero_point.t(), False, _group_size(tensor))


def _group_size(tensor: Any) -> int:
    return int(tensor.block_size[-1])


def _halves(tensor: Any) -> torch.Tensor:
    """The two codes of each byte, the lower half first."""
    import torch

    bytes_ = tensor.qdata.contiguous().view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).reshape(tensor.shape)


def dequantize(parts: Parts) -> torch.Tensor:
    """The values that a weight stands for: float32, of its shape, on its device."""
    import torch

    rows, columns = parts.codes.shape
    values = parts.codes.reshape(rows, -1, parts.group_size).to(torch.float32)
    scale, zero = parts.scale.float().unsqueeze(-1), parts.zero.float().unsqueeze(-1)
    values = values.sub_(zero).mul_(scale) if parts.whole else values.sub_(8).mul_(scale).add_(zero)
    return values.reshape(rows, columns)


def _both(scale_and_zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Out of (groups, out_features, 2)."""
    return scale_and_zero[..., 0].t(), scale_and_zero[..., 1].t()


def parameters(
    weight: torch.Tensor, group_size: int, algorithm: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8, of the weight's shape), scales and zero points (out_features, groups), as for the layout ``cuda``.

    The zero point is the value of code 8. Sources: ``Int4TilePackedTo4dTensor.from_hp`` of torchao 0.18 and the
    functions that it calls.
    """
    import torch
    from torchao.quantization import quant_primitives as primitives

    rows, columns = weight.shape
    if algorithm == "hqq":
        codes, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
            weight,
            nbits=4,
            group_size=group_size,
            axis=1,
            compute_dtype=weight.dtype,
            device=weight.device,
        )
    else:
        block = (1, group_size)
        scale, zero = primitives._choose_qparams_affine_tinygemm(
            weight,
            mapping_type=primitives.MappingType.ASYMMETRIC,
            block_size=block,
            target_dtype=torch.int32,
            quant_min=0,
            quant_max=15,
            scale_dtype=weight.dtype,
            zero_point_dtype=weight.dtype,
        )
        codes = primitives._quantize_affine_tinygemm(weight, block, scale, zero, torch.uint8, quant_min=0, quant_max=15)
    groups = columns // group_size
    return codes.to(torch.uint8), scale.reshape(rows, groups), zero.reshape(rows, groups)


def tile_packed(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """torchao's tensor for CUDA out of codes and parameters that are filled up already; ``shape`` is the weight's."""
    import torch
    from torchao.quantization import Int4TilePackedTo4dTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    if codes.is_cuda and torch.version.hip is None:
        halves = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack(halves, INNER_K_TILES)
    else:
        packed = tile_packing.pack(codes, INNER_K_TILES)
    both = pack_tinygemm_scales_and_zeros(scale, zero, scale.dtype)
    return cast(
        "torch.Tensor",
        Int4TilePackedTo4dTensor(
            qdata=packed, scale_and_zero=both, block_size=[1, group_size], shape=torch.Size(shape)
        ),
    )


def pad_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """What the layout for CUDA fills a weight up to."""
    rows, columns = shape
    return rows + -rows % tile_packing.ROWS, columns + -columns % COLUMNS


def opaque(parts: Parts, layout: str) -> torch.Tensor:
    """torchao's tensor for the CPU, packed in one of the CPU's layouts."""
    import torch
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    both = pack_tinygemm_scales_and_zeros(parts.scale, parts.zero, parts.scale.dtype)
    made = Int4OpaqueTensor(
        qdata=cpu_packing.pack(parts.codes, layout),
        scale_and_zero=both,
        block_size=[1, parts.group_size],
        shape=torch.Size(parts.codes.shape),
    )
    return cast("torch.Tensor", made)


def plain_int32(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> torch.Tensor:
    """torchao's tensor for Intel GPUs; ``zero`` is the code that stands for 0.

    Eight codes lie in an int32 in their order, the first in the lowest bits. Source of the layout:
    ``WeightInt4PackKernel.cpp`` in intel/torch-xpu-ops, which keeps the bytes that torchao gives it.
    """
    import torch
    from torchao.quantization import Int4PlainInt32Tensor

    halves = (codes[:, 1::2] << 4 | codes[:, ::2]).to(torch.uint8)
    return cast(
        "torch.Tensor",
        Int4PlainInt32Tensor(
            halves.contiguous().view(torch.int32),
            scale.t().contiguous(),
            zero.t().contiguous().to(torch.int8),
            [1, group_size],
            torch.Size(codes.shape),
        ),
    )
