"""The layouts of 4-bit weights for the CPU's int4 kernel, as index arithmetic; which one a machine uses.

``torch.ops.aten._convert_weight_to_int4pack_for_cpu`` cuts the rows in blocks and puts two rows in a byte. How many
rows a block has and which rows are neighbours depends on the vector instructions that PyTorch found, and nothing in
the packed tensor says so. Source: ``weight_to_int4pack_kernel`` in PyTorch's
``aten/src/ATen/native/cpu/int4mm_kernel.cpp``.

========================  ===============  ==========================================================
name                      rows of a block  byte j of a column of a full block: (lower, upper half)
========================  ===============  ==========================================================
``avx512``                64               rows j, j + 32
``avx2``                  32               rows j, j + 16
``pairs32``, ``pairs16``  32, 16           rows 2j, 2j + 1 (no vector code: other CPUs, Windows)
========================  ===============  ==========================================================

A last block with fewer rows has pairs everywhere. A block is stored column by column.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# name -> (rows of a block, whether the halves of a byte are half a block apart)
_LAYOUTS = {"avx512": (64, True), "avx2": (32, True), "pairs32": (32, False), "pairs16": (16, False)}
LAYOUTS = tuple(_LAYOUTS)
ROWS = 16
BLOCK_ROWS = max(rows for rows, _ in _LAYOUTS.values())  # a multiple of the others
UNKNOWN = "unknown"


def pack(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """Pack 4-bit codes for a machine that uses ``layout``.

    Args:
        codes: integers 0 to 15 of shape (n, k), one code an element; n is a multiple of 16, k is even.
        layout: a name of ``LAYOUTS``.

    Returns:
        uint8 of shape (n, k / 2), contiguous.

    Raises:
        ValueError: a shape that the layout does not have.
    """
    import torch

    rows, columns = codes.shape
    if rows % ROWS or columns % 2:
        raise ValueError(f"shape {(rows, columns)} is not (multiple of {ROWS}, even)")
    codes = codes.to(torch.uint8)
    parts = []
    for start, stop, height, apart in _blocks(rows, layout):
        block = codes[start:stop].reshape((stop - start) // height, height, columns)
        half = height // 2
        lower, upper = (block[:, :half], block[:, half:]) if apart else (block[:, ::2], block[:, 1::2])
        parts.append((lower | upper << 4).transpose(1, 2).flatten())
    return torch.cat([codes.new_empty(0), *parts]).reshape(rows, columns // 2)


def unpack(packed: torch.Tensor, layout: str) -> torch.Tensor:
    """The codes that :func:`pack` packed: uint8 of shape (n, k), one code an element.

    Raises:
        ValueError: a shape that the layout does not have.
    """
    import torch

    rows, columns = packed.shape[0], packed.shape[1] * 2
    if rows % ROWS:
        raise ValueError(f"{rows} rows are not a multiple of {ROWS}")
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=packed.device)
    for start, stop, height, apart in _blocks(rows, layout):
        half = height // 2
        count = (stop - start) // height
        block = packed[start:stop].reshape(count, columns, half).transpose(1, 2)
        target = codes[start:stop].view(count, height, columns)
        lower, upper = (target[:, :half], target[:, half:]) if apart else (target[:, ::2], target[:, 1::2])
        lower.copy_(block & 15)
        upper.copy_(block >> 4)
    return codes


def _blocks(rows: int, layout: str) -> list[tuple[int, int, int, bool]]:
    """(first row, end, rows of a block, halves apart) of the full blocks, and of what is left."""
    height, apart = _LAYOUTS[layout]
    full = rows // height * height
    blocks = [(0, full, height, apart)] if full else []
    return [*blocks, (full, rows, rows - full, False)] if full < rows else blocks


@functools.cache
def machine_layout() -> str:
    """The layout that PyTorch packs and reads on this machine, or ``unknown``: it is asked to pack a small weight.

    ``ATEN_CPU_CAPABILITY`` in the environment changes it, as for every kernel of PyTorch.
    """
    import torch

    # 112 rows: full blocks and a smaller one at the end, for every layout
    codes = (torch.arange(112 * 4, dtype=torch.int32).reshape(112, 4) * 7 // 3) % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return next((layout for layout in LAYOUTS if torch.equal(pack(codes, layout), packed)), UNKNOWN)
