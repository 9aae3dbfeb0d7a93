"""Spend a budget of bytes on many tensors so that the errors together are small: values only, no models, no weights.

A knapsack of which every tensor puts in one of its options (a multiple-choice knapsack; Kellerer, Pferschy and
Pisinger, "Knapsack Problems", chapter 11). What everybody does first: on each tensor's lower convex hull of bytes and
error, buy the steps that take away most error a byte. What is left of the budget then is spent by solving the few
tensors near the last step bought (the "core") as well as a grid of bytes allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

_CORE = 48
"""Tensors that are solved together."""

_GRID = 1 << 15
"""Steps of the budget while they are. Each tensor wastes less than one: 48 of them less than 0.15 % of the budget."""

_TRIES = 8
_CLOSE = 1 / 2000
"""This part of the target may be left before one tries again to spend it."""


@dataclass(frozen=True)
class Option:
    """What one way to store a tensor costs in bytes, and its squared error."""

    cost: int
    error: float


Item = Sequence[Option]
Selection = tuple[int, ...]
"""One option a tensor, by its place."""


@dataclass(frozen=True)
class _Step:
    """From a point of a tensor's hull to the next: ``rate`` is the error that goes away a byte."""

    item: int
    option: int
    cost: int
    rate: float


def cost_of(items: Sequence[Item], selection: Selection) -> int:
    """Bytes of all tensors."""
    return sum(item[at].cost for item, at in zip(items, selection, strict=True))


def error_of(items: Sequence[Item], selection: Selection) -> float:
    """Squared error of all tensors; the order of the tensors does not change a bit of it."""
    return math.fsum(item[at].error for item, at in zip(items, selection, strict=True))


def cheapest(items: Sequence[Item]) -> Selection:
    """The fewest bytes; of two options with as many the one with less error."""
    return tuple(min(range(len(item)), key=lambda at: (item[at].cost, item[at].error)) for item in items)


def hull(item: Item) -> list[int]:
    """The options on the lower convex hull of bytes and error, from the cheapest to the one with the least error."""
    found: list[int] = []
    for at in sorted(range(len(item)), key=lambda at: (item[at].cost, item[at].error)):
        point = item[at]
        if found and point.error >= item[found[-1]].error:
            continue
        # drop the last point as long as the way past it falls more steeply than the way to it
        while len(found) > 1 and _rate(item[found[-2]], item[found[-1]]) <= _rate(item[found[-1]], point):
            found.pop()
        found.append(at)
    return found


def _rate(start: Option, stop: Option) -> float:
    return (start.error - stop.error) / (stop.cost - start.cost)


def allocate(items: Sequence[Item], budget: int) -> Selection | None:
    """Choose an option a tensor, for at most ``budget`` bytes, so that the errors together are small.

    Returns:
        ``None`` where even the cheapest options cost more. The same numbers give the same selection. With more budget
        the error is never more than what the hulls alone give for less.
    """
    selection = list(cheapest(items))
    left = budget - cost_of(items, tuple(selection))
    if left < 0:
        return None
    steps = _steps(items)
    last = None
    stuck: set[int] = set()
    for step in steps:
        if step.item in stuck:
            continue
        if step.cost > left:
            last = last or step
            stuck.add(step.item)  # its further steps start from this one
            continue
        selection[step.item] = step.option
        left -= step.cost
    if last is None:
        return tuple(selection)
    bought = _fill(items, selection, left)
    solved = _fill(items, *_solve(items, selection, _core(steps, last), left))
    return min(bought, solved, key=lambda found: error_of(items, found))


def _steps(items: Sequence[Item]) -> list[_Step]:
    """The steps of all hulls, most error a byte first; those of one tensor stay in order, as its hull is convex."""
    steps = []
    for number, item in enumerate(items):
        points = hull(item)
        for start, stop in pairwise(points):
            steps.append(_Step(number, stop, item[stop].cost - item[start].cost, _rate(item[start], item[stop])))
    return sorted(steps, key=lambda step: -step.rate)


def _core(steps: Sequence[_Step], last: _Step) -> list[int]:
    """The tensors with a step that is worth about as much as ``last``."""
    distance: dict[int, float] = {}
    for step in steps:
        away = abs(math.log(step.rate / last.rate))
        distance[step.item] = min(away, distance.get(step.item, math.inf))
    return sorted(sorted(distance, key=lambda item: (distance[item], item))[:_CORE])


def _solve(items: Sequence[Item], selection: Sequence[int], core: Sequence[int], left: int) -> tuple[list[int], int]:
    """The best options for the tensors in ``core``, bytes rounded up to a grid; the others stay. And what is left."""
    least = {number: min(option.cost for option in items[number]) for number in core}
    room = left + sum(items[number][selection[number]].cost - least[number] for number in core)
    unit = max(1, -(-room // _GRID))
    size = room // unit + 1
    best = torch.zeros(size, dtype=torch.float64)
    chosen = []
    for number in core:
        table = torch.full((len(items[number]), size), math.inf, dtype=torch.float64)
        for at, option in enumerate(items[number]):
            shift = -(-(option.cost - least[number]) // unit)
            if shift < size:
                table[at, shift:] = best[: size - shift] + option.error
        best, places = table.min(dim=0)
        chosen.append(places)
    result = list(selection)
    at = size - 1
    for number, places in zip(reversed(core), reversed(chosen), strict=True):
        result[number] = int(places[at])
        at -= -(-(items[number][result[number]].cost - least[number]) // unit)
    spent = sum(items[number][result[number]].cost - least[number] for number in core)
    return result, room - spent


def _fill(items: Sequence[Item], selection: Sequence[int], left: int) -> Selection:
    """Take the single changes that still fit, the one that takes away most error first."""
    result = list(selection)
    while True:
        best: tuple[float, int, int] | None = None
        for number, item in enumerate(items):
            now = item[result[number]]
            for at, option in enumerate(item):
                gain = now.error - option.error
                if option.cost - now.cost <= left and gain > 0 and (best is None or gain > best[0]):
                    best = gain, number, at
        if best is None:
            return tuple(result)
        _, number, at = best
        left -= items[number][at].cost - items[number][result[number]].cost
        result[number] = at


def fit(
    items: Sequence[Item], target: int, exact: Callable[[Selection], int], singles: Sequence[Selection]
) -> Selection | None:
    """The selection with little error whose exact size is at most ``target``; ``None`` where no one was found.

    Args:
        items: the tensors; their costs may leave out what cannot be dealt to single tensors.
        target: bytes.
        exact: size of the whole in bytes.
        singles: selections that the result must not be worse than, where they fit: one scheme for all tensors.
    """
    start = cheapest(items)
    budget = target - exact(start) + cost_of(items, start)
    found: list[Selection] = [single for single in (start, *singles) if exact(single) <= target]
    too_much = math.inf
    for _ in range(_TRIES):
        selection = allocate(items, budget)
        if selection is None:
            break
        gap = target - exact(selection)
        if gap >= 0:
            found.append(selection)
        else:
            too_much = min(too_much, budget)
        if 0 <= gap <= _CLOSE * target or budget + gap >= too_much:
            break
        budget += gap
    return min(found, key=lambda selection: error_of(items, selection), default=None)
