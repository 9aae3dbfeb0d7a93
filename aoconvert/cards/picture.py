"""The picture of a card: SQNR by layer, plain SVG 1.1 with no script, no font and no address in it.

Drawn with presentation attributes on a ground of its own, so that it can be read on a light and on a dark page also
where a page's security policy drops the style element, which only adds the dark colours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from aoconvert.cards.layers import KINDS, Layer
from aoconvert.cards.markdown import visible
from aoconvert.cards.svg import WIDTH, begin, line, text, ticks

_HEIGHT = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 66, 46  # of the plot's frame, in pixels
_MOST = 2000  # points; more are thinned out to the lowest and highest of each column
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart
_COLORS = dict(zip(KINDS, ("#cc79a7", "#0072b2", "#e69f00", "#009e73", "#7f7f7f"), strict=True))
Point = tuple[float, float]


def draw(parts: Sequence[tuple[str, Sequence[Layer]]]) -> str | None:
    """The picture.

    Args:
        parts: each component's name (``""`` for a single model) and its layers.

    Returns:
        An SVG document; ``None`` where there are not two errors to show.
    """
    places: dict[str, list[tuple[int, float]]] = defaultdict(list)
    borders: list[tuple[int, str]] = []
    offset = 0
    for name, found in parts:
        borders.append((offset, name))
        for layer in found:
            if layer.sqnr is not None and math.isfinite(layer.sqnr):
                places[layer.kind].append((offset + layer.place, layer.sqnr))
        offset += len(found)
    values = [value for points in places.values() for _, value in points]
    if len(values) < 2:
        return None
    low, high, step = ticks(min(values), max(values))

    def x(place: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (place + 0.5) / offset

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    lines = [
        *begin(f"SQNR by layer: {len(values)} quantized layers, {min(values):.1f} to {max(values):.1f} dB", _HEIGHT),
        text(_LEFT, 24, "Error of each quantized layer", size=15, weight="600"),
        *_legend([kind for kind in KINDS if kind in places]),
    ]
    value = low
    while value <= high + step / 2:
        lines.append(line(_LEFT, y(value), WIDTH - _RIGHT, y(value)))
        lines.append(text(_LEFT - 8, y(value) + 4, f"{value:g}", anchor="end"))
        value += step
    lines += _borders(borders, x)
    for kind in KINDS:
        if kind in places:
            lines.append(_dots(kind, _thin([(x(place), y(value)) for place, value in places[kind]], len(values))))
    middle = _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    lines.append(text(16, middle, "SQNR in dB (higher is better)", anchor="middle", turn=True))
    lines.append(text((_LEFT + WIDTH - _RIGHT) / 2, _HEIGHT - 12, "layers, in the model's order", anchor="middle"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _thin(points: list[Point], total: int) -> list[Point]:
    """All points, or of too many the lowest and the highest in each column of pixels."""
    if total <= _MOST:
        return points
    columns: defaultdict[int, list[Point]] = defaultdict(list)
    for point in points:
        columns[int(point[0])].append(point)
    ends = [(min(c, key=lambda p: p[1]), max(c, key=lambda p: p[1])) for c in columns.values()]
    return list(dict.fromkeys(point for pair in ends for point in pair))


def _dots(kind: str, points: list[Point]) -> str:
    """One path: lines of no length with round ends are dots."""
    path = "".join(f"M{px:.1f} {py:.1f}h0" for px, py in points)
    mark = ' class="blue"' if _COLORS[kind] == "#0072b2" else ""
    width = 6 if len(points) < 300 else 4
    return (
        f'<path{mark} d="{path}" stroke="{_COLORS[kind]}" stroke-width="{width}" stroke-linecap="round" fill="none"/>'
    )


def _legend(shown: Sequence[str]) -> list[str]:
    lines, left = [], float(_LEFT)
    for kind in shown:
        lines.append(_dots(kind, [(left + 4, 44)]))
        lines.append(text(left + 13, 48, kind))
        left += 34 + 6.6 * len(kind)
    return lines


def _borders(borders: Sequence[tuple[int, str]], x: Callable[[float], float]) -> list[str]:
    """Where one component ends and the next begins; nothing for a single one."""
    if len(borders) < 2:
        return []
    lines = []
    for place, name in borders:
        left = x(place - 0.5)
        if place:
            lines.append(line(left, _TOP, left, _HEIGHT - _BOTTOM))
        lines.append(text(left + 4, _TOP - 5, visible(name)[:40]))
    return lines
