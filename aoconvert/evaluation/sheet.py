"""The contact sheet ``eval.png``: the original's picture, the quantized model's, and their difference, amplified."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

MOST_BYTES = 3_000_000
MOST_ROWS = 9
_SIDE, _LEAST = 384, 96  # pixels of a tile's longer side
_HEADER, _CAPTION, _GAP, _LETTERS = 30, 28, 4, 18  # large enough where a page shows the sheet half as wide
_TITLES = ("original", "quantized", "difference")
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Pair:
    """A row: its caption, and two pictures, uint8 (height, width, 3)."""

    caption: str
    before: torch.Tensor
    after: torch.Tensor


def choose_frames(count: int) -> list[int]:
    """The first, the middle and the last of a video; of a picture the one."""
    return sorted({0, count // 2, count - 1})


def draw_sheet(pairs: Sequence[Pair]) -> bytes:
    """A PNG of at most :data:`MOST_BYTES` with a row for each pair, of the first :data:`MOST_ROWS`."""
    rows = pairs[:MOST_ROWS]
    factor = amplification(rows)
    side = _SIDE
    while True:
        data = _draw(rows, factor, side)
        if len(data) <= MOST_BYTES or side <= _LEAST:
            return data
        side = max(_LEAST, side * 3 // 4)


def amplification(pairs: Sequence[Pair]) -> int:
    """By what differences are multiplied: the largest power of two up to 64 that takes hardly any beyond white.

    One value in a hundred may go beyond it: a single pixel is not to leave all others dark.
    """
    usual = max((float(np.quantile(_difference(pair), 0.99)) for pair in pairs), default=0.0)
    factor = 1
    while factor < 64 and 0 < usual * factor * 2 <= 255:
        factor *= 2
    return factor


def _difference(pair: Pair) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    before, after = (tensor.numpy().astype(np.int16) for tensor in (pair.before, pair.after))
    difference: np.ndarray[tuple[int, ...], np.dtype[np.int16]] = np.abs(before - after)
    return difference


def _draw(rows: Sequence[Pair], factor: int, side: int) -> bytes:
    from PIL import Image, ImageDraw

    tiles = [[_tile(picture, side) for picture in _pictures(pair, factor)] for pair in rows]
    width, height = (max(tile.size[axis] for row in tiles for tile in row) for axis in (0, 1))
    step = height + _CAPTION + _GAP
    sheet = Image.new("RGB", (3 * width + 4 * _GAP, _HEADER + len(rows) * step), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(_TITLES):
        shown = title if column < 2 else f"{title} x {factor}"
        pen.text((_GAP + column * (width + _GAP), 5), shown, fill=_INK, font_size=_LETTERS)
    for number, (pair, row) in enumerate(zip(rows, tiles, strict=True)):
        top = _HEADER + number * step
        pen.text((_GAP, top + 3), _fit(pen, pair.caption, 3 * width), fill=_INK, font_size=_LETTERS)
        for column, tile in enumerate(row):
            sheet.paste(tile, (_GAP + column * (width + _GAP), top + _CAPTION))
    place = io.BytesIO()
    sheet.save(place, "PNG", optimize=True)
    return place.getvalue()


def _pictures(pair: Pair, factor: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    amplified = (_difference(pair).astype(np.int32) * factor).clip(0, 255).astype(np.uint8)
    return [pair.before.numpy(), pair.after.numpy(), amplified]


def _tile(values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], side: int) -> Image:
    """Shrunk to a side, or enlarged by whole pixels."""
    from PIL import Image

    picture = Image.fromarray(values)
    longer = max(picture.size)
    if longer > side:
        size = tuple(max(1, round(length * side / longer)) for length in picture.size)
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    times = side // longer
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _fit(pen: ImageDraw, text: str, width: int) -> str:
    """What of a caption there is room for, in the letters that Pillow's own font has: those of ASCII."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    plain = "".join(letters).encode("ascii", "replace").decode()
    cut = plain
    while pen.textlength(cut, font_size=_LETTERS) > width and len(cut) > 8:
        cut = f"{cut.removesuffix('...')[:-1]}..."
    return cut
