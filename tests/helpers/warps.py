"""The packing kernel of tinygemm, one thread after the other.

Written after ``matrix_to_m16n8k16_Bint4_layout`` in PyTorch's ``aten/src/ATen/native/cuda/int4mm.cu`` (the branch for
NVIDIA): blocks, lanes and bytes as there, and none of the tensor arithmetic that it is to check.
"""

from __future__ import annotations

WARP = 32


def pack_by_threads(weight: list[list[int]], inner_k_tiles: int) -> list[list[list[list[int]]]]:
    """What the grid of warps writes for a weight of shape (n, k / 2), two codes a byte: signed 32-bit words."""
    blocks_n = (len(weight) + 7) // 8
    blocks_k = len(weight[0]) * 2 // (inner_k_tiles * 16)
    pairs = range(0, inner_k_tiles, 2)
    return [
        [
            [[_word(weight, n, k, lane, tile, inner_k_tiles) for tile in pairs] for lane in range(WARP)]
            for k in range(blocks_k)
        ]
        for n in range(blocks_n)
    ]


def _word(weight: list[list[int]], block_n: int, block_k: int, lane: int, tile: int, inner_k_tiles: int) -> int:
    """The word that a lane writes for the tiles ``tile`` and ``tile + 1`` of its block."""
    row = block_n * 8 + lane // 4
    first = (block_k * inner_k_tiles + tile) * 16 // 2 + lane % 4
    loaded = [weight[row][at] if row < len(weight) else 0 for at in (first, first + 4, first + 8, first + 12)]
    word = 0
    for byte, (upper, lower) in enumerate((value >> 4, value & 15) for value in loaded):
        word |= upper << (4 * byte)
        word |= lower << (16 + 4 * byte)
    return word - 2**32 if word >= 2**31 else word
