"""The tile-packed layout against a second account of it: the CUDA kernel's work, thread by thread."""

from __future__ import annotations

import pytest
import torch
from helpers.warps import pack_by_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from aoconvert.schemes import tile_packing

TILES = st.sampled_from(tile_packing.INNER_K_TILES)


def random_codes(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte as the CUDA op takes them, the even column in the upper half (torchao's ``quant_2d``)."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), TILES, st.integers(0, 2**30))
def test_it_packs_as_the_threads_of_the_kernel_do(rows: int, across: int, tiles: int, seed: int) -> None:
    codes = random_codes(rows, across * 16 * tiles, seed)
    packed = tile_packing.pack(codes, tiles)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.tolist() == pack_by_threads(halves(codes).tolist(), tiles)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), TILES, st.integers(0, 2**30))
def test_unpacking_gives_the_codes_and_rows_of_zeros(rows: int, across: int, tiles: int, seed: int) -> None:
    codes = random_codes(rows, across * 16 * tiles, seed)
    unpacked = tile_packing.unpack(tile_packing.pack(codes, tiles), tiles)
    assert unpacked.dtype == torch.uint8
    assert unpacked.shape == ((rows + 7) // 8 * 8, codes.shape[1])
    assert torch.equal(unpacked[:rows], codes)
    assert not unpacked[rows:].any()


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), TILES, st.integers(0, 2**30))
def test_packing_what_was_unpacked_gives_the_same_words(down: int, across: int, tiles: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (down, across, 32, tiles // 2)
    packed = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    assert torch.equal(tile_packing.pack(tile_packing.unpack(packed, tiles), tiles), packed)


@pytest.mark.parametrize("tiles", tile_packing.INNER_K_TILES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_dtype_of_the_codes_does_not_matter(tiles: int, dtype: torch.dtype) -> None:
    codes = random_codes(16, 32 * tiles, 0)
    assert torch.equal(tile_packing.pack(codes.to(dtype), tiles), tile_packing.pack(codes, tiles))


@pytest.mark.parametrize("tiles", tile_packing.INNER_K_TILES)
def test_on_meta_it_has_the_shape_that_torch_gives_the_op(tiles: int) -> None:
    codes = torch.empty(24, 64 * tiles, dtype=torch.uint8, device="meta")
    packed = tile_packing.pack(codes, tiles)
    op = torch.ops.aten._convert_weight_to_int4pack(halves(codes), tiles)
    assert (packed.shape, packed.dtype, packed.is_meta) == (op.shape, op.dtype, True)
    assert tile_packing.unpack(packed, tiles).shape == codes.shape


@pytest.mark.parametrize("tiles", [0, 1, 3, 16])
def test_only_the_layouts_of_the_kernel_are_taken(tiles: int) -> None:
    with pytest.raises(ValueError, match="inner_k_tiles"):
        tile_packing.pack(random_codes(8, 256, 0), tiles)
    with pytest.raises(ValueError, match="inner_k_tiles"):
        tile_packing.unpack(torch.zeros(1, 1, 32, 1, dtype=torch.int32), tiles)


def test_a_shape_that_the_layout_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        tile_packing.pack(random_codes(8, 120, 0), 8)
    with pytest.raises(ValueError, match="packed with 8"):
        tile_packing.unpack(torch.zeros(1, 1, 32, 2, dtype=torch.int32), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", tile_packing.INNER_K_TILES)
@pytest.mark.parametrize(("rows", "across"), [(8, 1), (1, 1), (5, 3), (24, 2), (131, 7), (1024, 8)])
def test_a_gpu_packs_the_same_words(rows: int, across: int, tiles: int) -> None:
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an NVIDIA GPU of capability 8.0")
    codes = random_codes(rows, across * 16 * tiles, rows)
    words = torch.ops.aten._convert_weight_to_int4pack(halves(codes).cuda(), tiles)
    assert torch.equal(tile_packing.pack(codes, tiles), words.cpu())
    assert torch.equal(tile_packing.pack(codes.cuda(), tiles), words)
