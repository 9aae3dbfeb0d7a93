"""What can be done with a torchao tensor, whatever its class: the table of classes knows how."""

from __future__ import annotations

from typing import Any

import torch

from aoconvert.errors import PlanError
from aoconvert.schemes import int4_parts
from aoconvert.schemes.tensor_classes import class_named


def dequantize(tensor: Any, cpu_layout: str | None = None) -> torch.Tensor:
    """The values that a quantized weight stands for, on any machine: float32, of its shape, on its device.

    torchao's own ``dequantize``; the int4 layouts have none, or one that runs on their device only.

    Args:
        tensor: a torchao tensor.
        cpu_layout: as :func:`take_apart` takes it.
    """
    made = class_named(type(tensor).__name__)
    if made.take_apart is not None:
        return int4_parts.dequantize(take_apart(tensor, cpu_layout))
    values: torch.Tensor = tensor.dequantize()
    return values.to(torch.float32)


def take_apart(tensor: Any, cpu_layout: str | None = None) -> int4_parts.Parts:
    """The parts of a 4-bit weight in groups, without what its layout fills up.

    Args:
        tensor: a torchao tensor, on any device.
        cpu_layout: of a weight for the CPU: the one it is packed in, this machine's if it is not said.

    Raises:
        PlanError: a class, or an activation scale, that nobody here knows.
    """
    name = type(tensor).__name__
    if getattr(tensor, "act_pre_scale", None) is not None or getattr(tensor, "act_mapping_type", None) is not None:
        raise PlanError([f"this {name} also says what to do with activations"])
    if (take := class_named(name).take_apart) is None:
        raise PlanError([f"{name} is not an int4 weight in groups"])
    return take(tensor, cpu_layout)


def repair(tensor: Any) -> int:
    """Give values without a scale one, and the code 0, in place; they load as zeros then.

    Args:
        tensor: what :func:`aoconvert.schemes.apply.quantize_weight` returned, also a plain tensor or one on ``meta``.

    Returns:
        How many rows, groups, blocks or weights there were; 0: nothing was changed.
    """
    mend = class_named(type(tensor).__name__).repair
    return 0 if mend is None or tensor.is_meta else mend(tensor)
