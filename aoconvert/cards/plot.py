"""A picture of several results: size against error, and memory against time, in the hand of the card's picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoconvert.cards.comparable import Comparable, Diagram
from aoconvert.cards.markdown import visible
from aoconvert.cards.svg import WIDTH, begin, line, text, ticks
from aoconvert.errors import SourceError
from aoconvert.files import check_replaceable, write_whole, writing

_HEIGHT = 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 22, 46, 50  # of a frame, in pixels
_LONGEST = 60  # characters of a name
_CHARACTER, _ROW, _DOT = 6.8, 20, 11  # pixels
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
_ORIGINAL = "#7f7f7f"
MOST = 2 * len(_COLORS)  # results that can be told apart
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
_SECONDS = ((1.0, "seconds"), (1e-3, "milliseconds"), (1e-6, "microseconds"))


@dataclass(frozen=True)
class Plot:
    """A picture that was written.

    Attributes:
        path: of it.
        diagrams: title → names of the results in it.
        left_out: (name, reason) of a result that is missing in a diagram.
    """

    path: Path
    diagrams: Mapping[str, tuple[str, ...]]
    left_out: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Give what ``bench --plot --json`` prints."""
        return {
            "plot": str(self.path),
            "diagrams": [{"title": title, "results": list(names)} for title, names in self.diagrams.items()],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }


def write_plot(path: Path, found: Comparable) -> Plot:
    """Draw diagrams into a file.

    Raises:
        WriteError: it cannot be written.
    """
    if not found.diagrams:
        raise SourceError(
            "nothing to draw: the reports hold no row that ran and no figure", hint="run aoconvert bench again"
        )
    with writing(path):
        check_replaceable(path)
        write_whole(path, draw_diagrams(found.diagrams).encode())
    names = {diagram.title: tuple(mark.name for mark in diagram.marks) for diagram in found.diagrams}
    return Plot(path, names, tuple(found.left_out))


def draw_diagrams(diagrams: Sequence[Diagram]) -> str:
    """One diagram as wide as the picture, or two side by side."""
    names = ", ".join(dict.fromkeys(visible(mark.name) for diagram in diagrams for mark in diagram.marks))
    legend = _legend(diagrams)
    title = " and ".join(visible(diagram.title) for diagram in diagrams)
    lines = begin(f"{title}: {names}", _HEIGHT + _ROW * len(legend) + 8)
    wide = WIDTH / len(diagrams)
    for place, diagram in enumerate(diagrams):
        lines += _draw(diagram, place * wide, wide)
    lines += [part for row in legend for part in row]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _draw(diagram: Diagram, start: float, wide: float) -> list[str]:
    left, right, top, bottom = start + _LEFT, start + wide - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    x_scale, x_unit = _unit([mark.x for mark in diagram.marks], _BYTES)
    y_scale, y_unit = _unit([mark.y for mark in diagram.marks], _SECONDS) if diagram.seconds else (1.0, "")
    places = [(mark.x / x_scale, mark.y / y_scale) for mark in diagram.marks]
    x_low, x_high, x_step = _axis([x for x, _ in places], from_zero=True)
    y_low, y_high, y_step = _axis([y for _, y in places], from_zero=diagram.from_zero)

    def at_x(value: float) -> float:
        return left + (right - left) * (value - x_low) / (x_high - x_low)

    def at_y(value: float) -> float:
        return top + (bottom - top) * (y_high - value) / (y_high - y_low)

    title = _cut(visible(diagram.title), int((right - left) / 7.6))
    lines = [text(left, 26, title, size=14, weight="600")]
    for value in _values(y_low, y_high, y_step):
        lines += [
            line(left, at_y(value), right, at_y(value)),
            text(left - 8, at_y(value) + 4, _tick(value), anchor="end"),
        ]
    for value in _values(x_low, x_high, x_step):
        lines += [
            line(at_x(value), bottom, at_x(value), bottom + 4),
            text(at_x(value), bottom + 18, _tick(value), anchor="middle"),
        ]
    y_label = f"{y_unit} {diagram.y_label} (lower is better)" if diagram.seconds else diagram.y_label
    lines.append(text(start + 18, (top + bottom) / 2, y_label, anchor="middle", turn=True))
    lines.append(text((left + right) / 2, _HEIGHT - 12, f"{diagram.x_label}, {x_unit}", anchor="middle"))
    points = [(at_x(x), at_y(y)) for x, y in places]
    dots = [_dot(mark.number, *point) for mark, point in zip(diagram.marks, points, strict=True)]
    return [*lines, *(part for parts in dots for part in parts)]


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1].rstrip()}…"


def _unit(values: Sequence[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which the largest value has one."""
    return next(((scale, name) for scale, name in units if max(values) >= scale), units[-1])


def _axis(values: Sequence[float], *, from_zero: bool) -> tuple[float, float, float]:
    low, high = (0.0 if from_zero else min(values)), max(values)
    low, high, step = ticks(low, high, max(abs(high) * 0.05, 1e-9))
    return (max(low, 0.0) if from_zero else low), high, step


def _values(low: float, high: float, step: float) -> list[float]:
    return [low + step * count for count in range(round((high - low) / step) + 1)]


def _tick(value: float) -> str:
    return f"{round(value, 12):g}"


def _dot(number: int, x: float, y: float) -> list[str]:
    """A line of no length with round ends; of a second round of colours it has a hole."""
    color = _ORIGINAL if number < 0 else _COLORS[number % len(_COLORS)]
    blue = ' class="blue"' if color == "#0072b2" else ""
    rounds = [(blue, color, _DOT), *([("", "#ffffff", _DOT // 2)] if number >= len(_COLORS) else [])]
    return [
        f'<path{mark} d="M{x:.1f} {y:.1f}h0" stroke="{ink}" stroke-width="{width}" stroke-linecap="round" fill="none"/>'
        for mark, ink, width in rounds
    ]


def _legend(diagrams: Sequence[Diagram]) -> list[list[str]]:
    """The rows of the legend: each result once, as many in a row as there is room for."""
    marks = {mark.number: mark for diagram in diagrams for mark in diagram.marks}
    rows: list[list[str]] = []
    left = float(WIDTH)
    for number in sorted(marks, key=lambda number: (number < 0, number)):
        name = _cut(visible(marks[number].name), _LONGEST)
        width = 34 + _CHARACTER * len(name)
        if left + width > WIDTH - _RIGHT:
            rows.append([])
            left = float(_LEFT)
        y = _HEIGHT + _ROW * len(rows) - 8
        rows[-1] += [*_dot(number, left + 5, y), text(left + 15, y + 4, name)]
        left += width
    return rows
