"""MXFP4 of gpt-oss: ``X_blocks`` and ``X_scales`` stand for ``X``, a stack of the experts' matrices.

``X_blocks`` is uint8 ``[experts, rows, groups, 16]``, two values (e2m1) in a byte, ``X_scales`` uint8 ``[experts, rows,
groups]``, the exponent of each group of 32 plus 127. ``X`` is ``[experts, 32 × groups, rows]``: transposed.
Source of names and formula: ``transformers.integrations.mxfp4``, whose own code makes the values here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aoconvert.models.base import Load, Rows, SourceTensor
from aoconvert.originals.base import Sorted, made

if TYPE_CHECKING:
    import torch

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32


@dataclass(frozen=True)
class Mxfp4:
    """A stack of matrices in groups of 4-bit values; a row of it is a whole matrix."""

    blocks: SourceTensor
    scales: SourceTensor
    unit: int = 1

    @property
    def parts(self) -> tuple[SourceTensor, ...]:
        """Values and scales."""
        return self.blocks, self.scales

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """In bfloat16, which holds every value."""
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        found: torch.Tensor = convert_moe_packed_tensors(
            load(self.blocks, rows), load(self.scales, rows), dtype=torch.bfloat16
        )
        return found


def sort(found: Sorted) -> str:
    """Take the quantized experts; say how they are stored.

    Raises:
        SourceError: blocks without their scales, or with ones that do not fit.
    """
    import torch

    for name in [name for name in found.left if name.endswith(_BLOCKS)]:
        blocks, base = found.left[name], name.removesuffix(_BLOCKS)
        scales = found.left.get(base + _SCALES)
        if scales is None:
            raise found.damaged(f"{name} has no {base}{_SCALES} beside it")
        if len(blocks.shape) != 4 or blocks.shape[-1] != _GROUP // 2 or blocks.dtype != torch.uint8:
            raise found.damaged(f"{name} has the shape {list(blocks.shape)}, which is not one of MXFP4")
        found.check_shape(scales, blocks.shape[:-1], name)
        experts, rows, groups, _ = blocks.shape
        found.add(made(base, torch.bfloat16, (experts, groups * _GROUP, rows), Mxfp4(blocks, scales)))
    found.refuse_narrow()
    return f"float4 with a power of two for each group of {_GROUP}"
