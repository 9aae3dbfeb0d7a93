"""The picture of a card: the error of each layer, plain SVG 1.1 with no script, no font and no address in it.

Drawn with presentation attributes on a ground of its own, so that it can be read on a light and on a dark page also
where a page's security policy drops the style element, which only adds the dark colours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from aoconvert.cards.layers import KINDS, Layer
from aoconvert.cards.markdown import visible
from aoconvert.cards.svg import WIDTH, begin, line, text, ticks

_HEIGHT = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 66, 46  # of the plot's frame, in pixels
_SECOND = 20  # of a second row of the legend
_MOST = 2000  # points; more are thinned out to the lowest and highest of each column
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart
_COLORS = dict(zip(KINDS, ("#cc79a7", "#0072b2", "#e69f00", "#009e73", "#7f7f7f"), strict=True))
_WEIGHT, _OUTPUT = "weight", "layer's output, on what the original gives to the layer"
Point = tuple[float, float]
Places = Mapping[str, Sequence[tuple[int, float]]]
"""Kind → place of a layer, and its error."""


def draw(parts: Sequence[tuple[str, Sequence[Layer]]]) -> str | None:
    """The picture: a dot for the error of each weight, and a diamond for that of the layer's output, where it is known.

    Args:
        parts: each component's name (``""`` for a single model) and its layers.

    Returns:
        An SVG document; ``None`` where there are not two errors to show.
    """
    borders, total = [], 0
    for name, found in parts:
        borders.append((total, name))
        total += len(found)
    weights = _place(parts, lambda layer: layer.sqnr)
    outputs = _place(parts, lambda layer: layer.output)
    values = [value for places in (weights, outputs) for points in places.values() for _, value in points]
    if len(values) < 2:
        return None
    low, high, step = ticks(min(values), max(values))
    top = _TOP + (_SECOND if outputs else 0)
    height = _HEIGHT + top - _TOP
    bottom = height - _BOTTOM

    def x(place: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (place + 0.5) / total

    def y(value: float) -> float:
        return top + (bottom - top) * (high - value) / (high - low)

    shown = [kind for kind in KINDS if kind in weights or kind in outputs]
    lines = [
        *begin(_title(weights, outputs), height),
        text(_LEFT, 24, "Error of each quantized layer", size=15, weight="600"),
    ]
    lines += _legend(shown) if not outputs else [*_explain(), *_legend(shown, _SECOND)]
    for value in _grid(low, high, step):
        lines.append(line(_LEFT, y(value), WIDTH - _RIGHT, y(value)))
        lines.append(text(_LEFT - 8, y(value) + 4, f"{value:g}", anchor="end"))
    lines += _borders(borders, x, top, bottom)
    for places, mark in ((weights, _dots), (outputs, _diamonds)):
        count = sum(map(len, places.values()))
        for kind in KINDS:
            if kind in places:
                lines.append(mark(kind, _thin([(x(place), y(value)) for place, value in places[kind]], count)))
    lines.append(text(16, (top + bottom) / 2, "SQNR in dB (higher is better)", anchor="middle", turn=True))
    lines.append(text((_LEFT + WIDTH - _RIGHT) / 2, height - 12, "layers, in the model's order", anchor="middle"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _place(parts: Sequence[tuple[str, Sequence[Layer]]], error: Callable[[Layer], float | None]) -> Places:
    """The layers of each kind that have an error."""
    found: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    offset = 0
    for _, members in parts:
        for layer in members:
            value = error(layer)
            if value is not None and math.isfinite(value):
                found[layer.kind].append((offset + layer.place, value))
        offset += len(members)
    return found


def _title(weights: Places, outputs: Places) -> str:
    """What it shows, for who cannot see it."""
    shown = [(weights, "quantized layers"), *([(outputs, "of their outputs")] if outputs else [])]
    ranges = []
    for places, what in shown:
        if values := [value for points in places.values() for _, value in points]:
            ranges.append(f"{len(values)} {what}, {min(values):.1f} to {max(values):.1f} dB")
    return f"SQNR by layer: {'; '.join(ranges)}"


def _grid(low: float, high: float, step: float) -> list[float]:
    return [low + step * count for count in range(round((high - low) / step) + 1)]


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


def _diamonds(kind: str, points: list[Point]) -> str:
    """One path: hollow, so that the dot of the same layer is seen through it."""
    size = 4 if len(points) < 300 else 2
    shape = f"l{size} {size}-{size} {size}-{size}-{size}z"
    path = "".join(f"M{px:.1f} {py - size:.1f}{shape}" for px, py in points)
    mark = ' class="blue"' if _COLORS[kind] == "#0072b2" else ""
    return f'<path{mark} d="{path}" stroke="{_COLORS[kind]}" stroke-width="1.4" fill="none"/>'


def _explain() -> list[str]:
    """The first row of the legend: which mark is what."""
    right = _LEFT + 34 + 6.6 * len(_WEIGHT)
    return [
        _dots("other", [(_LEFT + 4, 44)]),
        text(_LEFT + 13, 48, _WEIGHT),
        _diamonds("other", [(right + 4, 44)]),
        text(right + 13, 48, _OUTPUT),
    ]


def _legend(shown: Sequence[str], down: float = 0) -> list[str]:
    lines, left = [], float(_LEFT)
    for kind in shown:
        lines.append(_dots(kind, [(left + 4, 44 + down)]))
        lines.append(text(left + 13, 48 + down, kind))
        left += 34 + 6.6 * len(kind)
    return lines


def _borders(borders: Sequence[tuple[int, str]], x: Callable[[float], float], top: float, bottom: float) -> list[str]:
    """Where one component ends and the next begins; nothing for a single one."""
    if len(borders) < 2:
        return []
    lines = []
    for place, name in borders:
        left = x(place - 0.5)
        if place:
            lines.append(line(left, top, left, bottom))
        lines.append(text(left + 4, top - 5, visible(name)[:40]))
    return lines
