"""The layout of 4-bit weights for tinygemm, CUDA's int4 kernel, as index arithmetic: made and read on any device.

``torch.ops.aten._convert_weight_to_int4pack`` writes it, but has a kernel for GPUs only. The layout is read off
``matrix_to_m16n8k16_Bint4_layout`` in PyTorch's ``aten/src/ATen/native/cuda/int4mm.cu``, the branch for NVIDIA (AMD's
has tiles of 16 rows). There the weight of shape (n, k) is cut in tiles of 8 rows x 16 columns, what one instruction
``mma.m16n8k16`` takes as its B operand. ``inner_k_tiles`` neighbouring tiles of a row of tiles lie together, two of
them in an int32 for each of the 32 lanes of a warp::

    packed[n / 8][k / (16 * inner_k_tiles)][lane][inner_k_tiles / 2]

    lane = 4 * (row of the tile) + c        c in 0..3
    a lane holds the columns 2c, 2c + 1, 2c + 8 and 2c + 9 of each of the two tiles
    bits 0..15 of its int32: columns 2c and 2c + 8 of the first tile, then of the second
    bits 16..31:             columns 2c + 1 and 2c + 9, in the same order
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROWS = 8
COLUMNS = 16
LANES = 32
INNER_K_TILES = (2, 4, 8)
_LOWER = 0x0F0F0F0F0F0F0F0F  # of each of eight bytes


def pack(codes: torch.Tensor, inner_k_tiles: int) -> torch.Tensor:
    """Pack 4-bit codes.

    Args:
        codes: integers 0 to 15 of shape (n, k), one code an element, of any integer dtype, on any device; k is a
            multiple of ``16 * inner_k_tiles``. Rows up to the next multiple of 8 are filled with code 0.
        inner_k_tiles: 2, 4 or 8 tiles side by side; torchao uses 8.

    Returns:
        int32 of shape (ceil(n / 8), k / (16 * inner_k_tiles), 32, inner_k_tiles / 2), contiguous.

    Raises:
        ValueError: a shape or an ``inner_k_tiles`` that the layout does not have.
    """
    import torch

    _check_tiles(inner_k_tiles)
    if codes.dim() != 2 or codes.shape[1] % (COLUMNS * inner_k_tiles):
        raise ValueError(f"shape {tuple(codes.shape)} is not (n, multiple of {COLUMNS * inner_k_tiles})")
    rows, columns = codes.shape
    if missing := -rows % ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing))
    down, across, pairs = codes.shape[0] // ROWS, columns // (COLUMNS * inner_k_tiles), inner_k_tiles // 2
    # eight columns in one integer: lane and odd column; a column and the eighth after it share a byte
    eights = _words(codes).reshape(down, ROWS, across, pairs, 2, 2)
    bytes_ = (eights[..., 0] | eights[..., 1] << 4).view(torch.uint8).reshape(down, ROWS, across, pairs, 2, 4, 2)
    lanes = bytes_.permute(0, 2, 1, 5, 3, 6, 4).reshape(-1)
    return lanes.view(torch.int32).reshape(down, across, LANES, pairs)


def unpack(packed: torch.Tensor, inner_k_tiles: int) -> torch.Tensor:
    """The codes of a packed weight, with the rows that :func:`pack` filled up.

    Args:
        packed: int32 of shape (n / 8, k / (16 * inner_k_tiles), 32, inner_k_tiles / 2), on any device.
        inner_k_tiles: what it was packed with.

    Returns:
        uint8 of shape (n, k) with values 0 to 15, one code an element.

    Raises:
        ValueError: a shape, dtype or ``inner_k_tiles`` that the layout does not have.
    """
    import torch

    _check_tiles(inner_k_tiles)
    if packed.dim() != 4 or packed.shape[2:] != (LANES, inner_k_tiles // 2) or packed.dtype != torch.int32:
        raise ValueError(f"{packed.dtype} of shape {tuple(packed.shape)} is not packed with {inner_k_tiles} k-tiles")
    (down, across), pairs = packed.shape[:2], inner_k_tiles // 2
    lanes = packed.reshape(-1).view(torch.uint8).reshape(down, across, ROWS, 4, pairs, 2, 2)
    bytes_ = lanes.permute(0, 2, 1, 4, 6, 3, 5).reshape(-1)
    eights = bytes_.view(torch.int64)
    codes = torch.stack((eights & _LOWER, (eights >> 4) & _LOWER), dim=-1)
    return codes.view(torch.uint8).reshape(down * ROWS, across * COLUMNS * inner_k_tiles)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes in an int64, in memory order."""
    import torch

    codes = codes.to(torch.uint8).contiguous()
    if codes.storage_offset() % 8:
        codes = codes.clone()
    return codes.view(torch.int64)


def _check_tiles(inner_k_tiles: int) -> None:
    if inner_k_tiles not in INNER_K_TILES:
        raise ValueError(f"inner_k_tiles is {inner_k_tiles}; the layout has 2, 4 or 8")
