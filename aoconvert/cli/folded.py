"""The list of schemes on one screen: schemes that differ in a number of bits are one line, and a line is never cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_FOLD_FROM = 4  # schemes; fewer are listed one by one
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")


@dataclass(frozen=True)
class Line:
    """One line of the list: a scheme, or several that differ in one number.

    Attributes:
        name: of the scheme, or ``intx{1-8}wo``.
        row: the catalogue's row of the first of them.
        summary: when to choose it, as long as there is room for.
    """

    name: str
    row: dict[str, object]
    summary: str


def fold(rows: Sequence[dict[str, object]], room: int) -> list[Line]:
    """The list, in the catalogue's order.

    Args:
        rows: the catalogue, with ``name`` and ``summary``.
        room: columns for the summary.
    """
    groups: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault(_LAST_NUMBER.sub("N", str(row["name"])), []).append(row)
    lines = []
    for row in rows:
        group = groups[_LAST_NUMBER.sub("N", str(row["name"]))]
        if len(group) < _FOLD_FROM:
            lines.append(Line(str(row["name"]), row, brief(str(row["summary"]), room)))
        elif row is group[0]:
            lines.append(_fold(group, room))
    return lines


def _fold(group: Sequence[dict[str, object]], room: int) -> Line:
    first, last = str(group[0]["name"]), str(group[-1]["name"])
    low, high = (match[0] for name in (first, last) if (match := _LAST_NUMBER.search(name)))
    summary = str(group[0]["summary"]).replace(f"{low}-bit", f"{low}- to {high}-bit")
    for name in re.findall(rf"\b[a-z]\w*{low}[a-z]*\b", summary):  # another family that is folded like this one
        summary = summary.replace(name, _LAST_NUMBER.sub(f"{{{low}-{high}}}", name))
    return Line(_LAST_NUMBER.sub(f"{{{low}-{high}}}", first), group[0], brief(summary, room))


def brief(summary: str, room: int) -> str:
    """As much of a sentence as there is room for, up to a colon, semicolon or comma, or else to a whole word."""
    if len(summary) <= room:
        return summary
    stops = [match.start() for match in re.finditer(r"[:;,] ", summary) if match.start() <= room]
    if stops:
        return summary[: stops[-1]]
    words = [match.start() for match in re.finditer(" ", summary) if match.start() < room]
    return f"{summary[: words[-1]]}…" if words else summary
