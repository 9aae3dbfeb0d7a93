"""The layout of floats of 3 to 7 bits for FP6-LLM's kernel, as index arithmetic. Only read: no torchao of today has it.

Each value of ``nbits`` is cut, from its highest bit on, in pieces of 1, 2 and 4 bits, as the sum asks for; the pieces
of one size of all values lie together, in words of 32 bits. Source: ``weight_prepacking.h`` of usyd-fsalab/fp6_llm, for
other sizes than 6 bits as torchao 0.5 to 0.16 generalized it::

    a matrix (m, n) is cut in tiles of 64 x 16; a tile in 4 x 2 x 2 blocks of 8 rows x 8 columns:
        block = (16 rows of the tile, left or right 8 columns, upper or lower 8 rows)
    lane l of 32 holds the columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of every block, one block after the other
    the pieces of a lane fill words one after the other; word w of lane l is the (32 w + l)-th
    within a word, from its highest bits on, stand the pieces 1, 5, 9, … then 3, 7, … then 0, 4, … then 2, 6, …
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROWS = 64
COLUMNS = 64
_LANES = 32
_WORD = 32
_PIECES = (1, 2, 4)


def unpack(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """The values of a packed matrix.

    Args:
        packed: uint8 of shape (m, n * nbits / 8); m and n are multiples of 64.
        nbits: of a value, 3 to 7.

    Returns:
        uint8 of shape (m, n), a value in the low bits of each.

    Raises:
        ValueError: a shape that the layout does not have.
    """
    import torch

    rows, width = packed.shape
    columns = width * 8 // nbits
    if rows % ROWS or columns % COLUMNS or columns * nbits != width * 8:
        raise ValueError(f"shape {tuple(packed.shape)} does not hold values of {nbits} bits in tiles")
    flat, start, left = packed.flatten(), 0, nbits
    found = torch.zeros(_LANES, rows * columns // _LANES, dtype=torch.uint8, device=packed.device)
    for size in (piece for piece in _PIECES if nbits & piece):
        stop = start + rows * columns * size // 8
        left -= size
        found |= _pieces(flat[start:stop].clone(), size) << left
        start = stop
    blocks = found.reshape(_LANES, -1, 2).transpose(0, 1)
    tiles = blocks.reshape(rows // ROWS, columns // 16, 4, 2, 2, 8, 8)
    return tiles.permute(0, 2, 4, 5, 1, 3, 6).reshape(rows, columns)


def _pieces(data: torch.Tensor, size: int) -> torch.Tensor:
    """Pieces of ``size`` bits: uint8 of shape (32 lanes, pieces of a lane)."""
    import torch

    words = data.view(torch.int32).reshape(-1, _LANES)
    count = _WORD // size
    order = [piece for first in (1, 3, 0, 2) for piece in range(first, count, 4)]
    found = torch.empty(_LANES, words.shape[0], count, dtype=torch.uint8, device=data.device)
    for place, piece in enumerate(order):
        shifted = words >> (_WORD - (place + 1) * size)
        found[:, :, piece] = (shifted & ((1 << size) - 1)).to(torch.uint8).t()
    return found.reshape(_LANES, -1)
