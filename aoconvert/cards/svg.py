"""What the pictures have in common: size, colours, axes and text, plain SVG 1.1.

Drawn with presentation attributes on a ground of its own, so that a picture can be read on a light and on a dark page
also where a page's security policy drops the style element, which only adds the dark colours.
"""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

WIDTH = 840  # pixels
_STYLE = (
    "@media (prefers-color-scheme: dark) { .ground { fill: #161b22 } .ink { fill: #e6edf3 } "
    ".grid { stroke: #3d444d } .blue { stroke: #56b4e9 } }"
)


def begin(title: str, height: int) -> list[str]:
    """The first lines of a picture: its title for who cannot see it, and its ground."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' role="img" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
    ]


def ticks(lowest: float, highest: float, least: float = 0.5) -> tuple[float, float, float]:
    """Limits and step of the axis: 1, 2 or 5 times a power of ten, three to seven lines.

    Args:
        lowest, highest: of the values.
        least: span of the axis.
    """
    span = max(highest - lowest, least)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)
    low, high = math.floor(lowest / step) * step, math.ceil(highest / step) * step
    while high - low < 1.5 * step:  # one value, or all between two lines
        low, high = low - step, high + step
    return low, high, step


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of the grid."""
    return f'<path class="grid" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#d0d7de"/>'


def text(
    x: float, y: float, content: str, *, anchor: str = "start", size: int = 12, weight: str = "400", turn: bool = False
) -> str:
    """A line of text; ``turn``: from bottom to top."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text class="ink" x="{x:.1f}" y="{y:.1f}" fill="#1f2328" text-anchor="{anchor}" font-size="{size}"'
        f' font-weight="{weight}"{turned}>{escape(content)}</text>'
    )
