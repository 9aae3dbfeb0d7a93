"""Pairs of pictures, and the sheet of them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from aoconvert.evaluation.pictures import compare_pictures
from aoconvert.evaluation.sheet import MOST_BYTES, Pair, amplification, choose_frames, draw_sheet


def noise(*shape: int, least: int = 0, most: int = 256) -> torch.Tensor:
    return torch.randint(least, most, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_noise_of_known_size_has_the_psnr_that_theory_gives() -> None:
    """±4 of 255 everywhere: 20·log10(255/4); the SSIM of equal pictures is 1."""
    before = noise(2, 32, 32, 3, least=4, most=252)
    signs = noise(2, 32, 32, 3, most=2).to(torch.int16) * 8 - 4
    after = (before.to(torch.int16) + signs).to(torch.uint8)
    after[1] = before[1]
    found = compare_pictures(before, after, lpips=False)
    assert found["psnr"] == [pytest.approx(20 * math.log10(255 / 4), rel=1e-6)]
    assert found["frames"] == 2
    assert found["ssim"][0] < found["ssim"][1] == 1.0
    assert "lpips" not in found


def test_pictures_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="quantized model's"):
        compare_pictures(noise(1, 8, 8, 3), noise(1, 8, 9, 3), lpips=False)


def test_the_sheet_shows_both_pictures_and_their_amplified_difference() -> None:
    before = torch.full((48, 64, 3), 100, dtype=torch.uint8)
    after = before.clone()
    after[:, 32:] += 5
    pair = Pair("seed 1: 熊猫 in a forest", before, after)
    assert amplification([pair]) == 32
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet([pair]))))
    assert sheet.shape == (30 + 28 + 288 + 4, 3 * 384 + 16, 3)
    top, middle = 30 + 28, 30 + 28 + 144
    assert sheet[middle, 4 + 10].tolist() == [100] * 3
    assert sheet[middle, 8 + 384 + 380].tolist() == [105] * 3
    assert sheet[middle, 12 + 768 + 10].tolist() == [0] * 3
    assert sheet[middle, 12 + 768 + 380].tolist() == [160] * 3
    assert (sheet[:top] < 128).any()  # titles and a caption


def test_a_caption_has_letters_that_there_are_and_fits() -> None:
    """Pillow's own font has those of ASCII only: others would all be the same empty box."""
    picture = torch.full((32, 32, 3), 100, dtype=torch.uint8)
    plain, accents, long = (
        draw_sheet([Pair(caption, picture, picture)]) for caption in ("Cafe in ??", "Café in 東京", "W" * 500)
    )
    assert plain == accents
    sheet = np.asarray(Image.open(io.BytesIO(long)))
    assert (sheet[30:58, -100:-20] < 128).any() and not (sheet[30:58, -4:] < 128).any()


def test_equal_pictures_have_no_difference_to_amplify() -> None:
    picture = noise(16, 16, 3)
    assert amplification([Pair("", picture, picture)]) == 1


@pytest.mark.exhaustive
def test_a_sheet_is_not_large() -> None:
    pairs = [Pair("noise", noise(512, 512, 3), noise(512, 512, 3)) for _ in range(12)]
    data = draw_sheet(pairs)
    assert len(data) <= MOST_BYTES
    width, height = Image.open(io.BytesIO(data)).size
    assert width < 3 * 384 and height > width  # nine rows


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (2, [0, 1]), (9, [0, 4, 8])])
def test_frames(count: int, chosen: list[int]) -> None:
    assert choose_frames(count) == chosen
