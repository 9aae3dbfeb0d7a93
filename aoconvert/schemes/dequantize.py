"""The values that a quantized weight stands for, on any machine."""

from __future__ import annotations

from typing import Any

import torch

_INT4 = {"Int4TilePackedTo4dTensor", "Int4OpaqueTensor", "Int4PlainInt32Tensor", "Int4Tensor"}


def dequantize(tensor: Any) -> torch.Tensor:
    """A torchao tensor as float32.

    torchao's own ``dequantize``; the int4 layouts have none, or one that runs on their device only.
    """
    if type(tensor).__name__ in _INT4:
        from aoconvert.schemes.int4_parts import dequantize as from_parts

        return from_parts(tensor)
    values: torch.Tensor = tensor.dequantize()
    return values.to(torch.float32)
