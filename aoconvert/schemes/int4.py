"""4-bit weights in groups, packed for the device that loads them: torchao's arithmetic, on any machine.

torchao writes the layouts ``cuda`` and ``xpu`` only on such a device: ``Int4TilePackedTo4dTensor.from_hp`` asks for
the GPU's capability, ``Int4PlainInt32Tensor.from_hp`` for the weight's device, and the op that packs has no CPU kernel.
All else in them is plain torch. So the steps of these two are taken here with torchao's own functions, and the packing
is :mod:`.tile_packing`. Giving the op a CPU kernel (``torch.library``) would not lift torchao's checks and would
change torch for everybody in the process. The layout ``cpu`` is torchao's own ``Int4OpaqueTensor.from_hp``, and
``plain`` is torchao's ``Int4Tensor.from_hp``, which needs the package mslk.

On ``meta`` all four give the real class, inner shapes and dtypes.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, cast

from aoconvert.environment import import_torchao, torch_build
from aoconvert.errors import PlanError, UsageError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.schemes import cpu_packing
from aoconvert.schemes.int4_parts import pad_shape, parameters, plain_int32, tile_packed

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

DEVICES = ("cuda", "cpu", "xpu", "plain")
ALGORITHMS = ("tinygemm", "hqq")
_OPAQUE = "opaque_"

# What the kernels have: int4mm.cu and torchao's Int4WeightOnlyConfig; for the CPU Int4OpaqueTensor.from_hp
_GROUP_SIZES = (32, 64, 128, 256)
_GROUP_SIZES_CPU = (32, 64, 128)
_HQQ = ("cuda", "cpu")


def config(group_size: int, device: str, algorithm: str = "tinygemm") -> AOBaseConfig:
    """torchao's config, which the libraries can read back from ``config.json``.

    The layout for the CPU has none: ``config_from_dict`` does not find ``PrototypeInt4WeightOnlyConfig``, and a
    ``config.json`` with it cannot be loaded. It gets ``Int4WeightOnlyConfig`` with its default packing; the loaders
    take class and layout from the weights themselves.

    Args:
        group_size: ``in_features`` that share a scale.
        device: ``cuda``, ``cpu``, ``xpu`` or ``plain``.
        algorithm: ``tinygemm`` (from minimum and maximum) or ``hqq`` (searched: slower, less error).

    Raises:
        UsageError: a value that this layout does not have.
    """
    if device not in DEVICES:
        raise UsageError(f"int4 has no layout for {device!r}", hint=f"--layout-device can be {', '.join(DEVICES)}")
    if algorithm not in ALGORITHMS:
        raise UsageError(f"int4 has no algorithm {algorithm!r}", hint=f"use {' or '.join(ALGORITHMS)}")
    if group_size not in (sizes := _GROUP_SIZES_CPU if device == "cpu" else _GROUP_SIZES):
        hint = f"--group-size can be {', '.join(map(str, sizes))}"
        raise UsageError(f"int4 for {device} has no group size {group_size}", hint=hint)
    if algorithm == "hqq" and device not in _HQQ:
        raise UsageError(f"int4 for {device} has no hqq", hint="torchao has it for cuda and cpu; use tinygemm")
    import_torchao()
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm, Int4PackingFormat

    formats = {"cuda": Int4PackingFormat.TILE_PACKED_TO_4D, "xpu": Int4PackingFormat.PLAIN_INT32}
    return cast(
        "AOBaseConfig",
        Int4WeightOnlyConfig(
            group_size=group_size,
            int4_packing_format=formats.get(device, Int4PackingFormat.PLAIN),
            int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm(algorithm),
        ),
    )


def blocker(shape: tuple[int, ...], dtype: torch.dtype, *, group_size: int, device: str) -> str | None:
    """Why a weight cannot be packed for a device, in words; ``None`` if it can."""
    import torch

    name = dtype_name(dtype)
    if len(shape) != 2:
        return f"int4 needs a matrix, not {len(shape)} dimensions"
    if not all(shape):
        return "it is empty"
    if device == "cuda" and dtype != torch.bfloat16:
        return f"int4 for cuda needs bfloat16, not {name}"
    if device == "xpu" and dtype not in (torch.bfloat16, torch.float16):
        return f"int4 for xpu needs bfloat16 or float16, not {name}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"int4 needs bfloat16, float16 or float32, not {name}"
    if shape[1] % group_size:
        return f"in_features {shape[1]} is not a multiple of the group size {group_size}"
    if device == "cpu" and shape[0] % cpu_packing.ROWS:
        return f"out_features {shape[0]} is not a multiple of {cpu_packing.ROWS}, which int4 for cpu needs"
    return None


def unavailable(device: str) -> str | None:
    """Why a layout cannot be made on this machine; ``None`` if it can."""
    if device == "cuda" and torch_build().startswith("rocm"):
        return "torch reads the cuda layout of int4 differently on AMD GPUs, and would compute wrong numbers"
    if device == "plain" and importlib.util.find_spec("mslk") is None:
        return (
            "the plain layout of int4 needs the package mslk >= 1.0.0, which is not on PyPI; the layouts for cuda "
            "and cpu do not need it"
        )
    return None


def machine_packing() -> str:
    """What a manifest calls the packing of the layout for the CPU that this machine makes."""
    return _OPAQUE + machine_layout()


def machine_layout() -> str:
    """The layout of int4 for the CPU that PyTorch packs and reads on this machine: see :mod:`.cpu_packing`."""
    return cpu_packing.machine_layout()


def cpu_layout(packing: str) -> str | None:
    """The CPU's layout in what a manifest calls ``packing`` (several are joined by ``+``); ``None``: there is none."""
    found = (part.removeprefix(_OPAQUE) for part in packing.split("+") if part.startswith(_OPAQUE))
    return next(found, None)


def fits_machine(layout: str) -> bool:
    """Whether this machine computes the right thing with weights in this layout of the CPU.

    On another one they load, and give wrong numbers without a word.
    """
    return layout in cpu_packing.LAYOUTS and layout == machine_layout()


def misfit(packing: str) -> str | None:
    """Why this machine gets wrong numbers from weights that a manifest calls so packed; ``None`` if it does not."""
    layout = cpu_layout(packing)
    if layout is None or fits_machine(layout):
        return None
    return (
        f"its int4 weights are in the CPU layout {layout}, but this machine uses {machine_layout()} and would "
        f"compute wrong numbers; aoconvert repack --layout-device cpu packs them for this machine"
    )


def quantize(weight: torch.Tensor, *, group_size: int, device: str, algorithm: str = "tinygemm") -> torch.Tensor:
    """Quantize one weight as torchao does on the device that it is packed for.

    ``hqq`` searches in float16 on a CUDA device and in float32 elsewhere (torchao's
    ``optimize_weights_proximal_legacy``), so it gives other parameters there; ``tinygemm`` gives the same everywhere.

    Args:
        weight: of shape (out_features, in_features), which :func:`blocker` lets pass, on any device, also ``meta``.
        group_size, device, algorithm: as :func:`config` takes them.

    Returns:
        ``Int4TilePackedTo4dTensor`` (cuda), ``Int4OpaqueTensor`` (cpu), ``Int4PlainInt32Tensor`` (xpu) or
        ``Int4Tensor`` (plain), on the weight's device; for the layout of the CPU on the CPU.

    Raises:
        PlanError: the layout needs a package that is not installed.
    """
    import_torchao()
    import torch

    with torch.no_grad():
        return _quantize(weight.detach(), group_size, device, algorithm)


def _quantize(weight: torch.Tensor, group_size: int, device: str, algorithm: str) -> torch.Tensor:
    if device == "cuda":
        # hqq looks at values, and makes the same shapes
        return _for_cuda(weight, group_size, "tinygemm" if weight.is_meta else algorithm)
    if device == "xpu":
        return _for_xpu(weight, group_size)
    if weight.is_meta:
        return _on_meta(weight, group_size, device)
    if device == "cpu":
        return _for_cpu(weight, group_size, algorithm)
    if (reason := unavailable(device)) is not None:
        raise PlanError([reason])
    from torchao.quantization import Int4Tensor

    return cast("torch.Tensor", Int4Tensor.from_hp(weight, [1, group_size]))


def _for_cuda(weight: torch.Tensor, group_size: int, algorithm: str) -> torch.Tensor:
    """The steps of ``Int4TilePackedTo4dTensor.from_hp``."""
    import torch

    rows, columns = pad_shape(weight.shape)
    filled = torch.nn.functional.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))
    return tile_packed(*parameters(filled, group_size, algorithm), group_size, weight.shape)


def _for_cpu(weight: torch.Tensor, group_size: int, algorithm: str) -> torch.Tensor:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    made = Int4OpaqueTensor.from_hp(weight.cpu(), [1, group_size], Int4ChooseQParamsAlgorithm(algorithm))
    return cast("torch.Tensor", made)


def _for_xpu(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """The steps of ``_from_hp_xpu`` in torchao's ``int4_plain_int32_tensor.py``."""
    import torch
    from torchao.quantization import quant_primitives as primitives

    block = (1, group_size)
    scale, zero = primitives.choose_qparams_affine(
        weight, primitives.MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6, None, torch.int32
    )
    codes = primitives.quantize_affine(weight, block, scale, zero, torch.int32, 0, 15)
    rows = weight.shape[0]
    return plain_int32(codes, scale.reshape(rows, -1), zero.reshape(rows, -1), group_size)


def _on_meta(weight: torch.Tensor, group_size: int, device: str) -> torch.Tensor:
    """The classes whose ``from_hp`` does not run on meta."""
    import torch
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization import Int4Tensor

    rows, columns = weight.shape
    groups = columns // group_size
    facts: dict[str, Any] = {"block_size": [1, group_size], "shape": weight.shape}
    if device == "cpu":
        qdata = weight.new_empty((rows, columns // 2), dtype=torch.uint8)
        # torchao's strides, which are others where there is one group only
        pairs = weight.new_empty((rows, groups, 2)).transpose(0, 1).contiguous()
        made = Int4OpaqueTensor(qdata=qdata, scale_and_zero=pairs, **facts)
    else:
        qdata = weight.new_empty((rows, columns // 2), dtype=torch.int8)
        scale, zero = weight.new_empty((groups, rows)), weight.new_empty((groups, rows))
        made = Int4Tensor(qdata=qdata, scale=scale, zero_point=zero, activation_dtype=torch.bfloat16, **facts)
    return cast("torch.Tensor", made)
