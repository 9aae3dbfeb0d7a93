"""The pure choice: which option for which tensor, for so many bytes."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from aoconvert.searching.allocate import Item, Option, Selection, allocate, cheapest, cost_of, error_of, fit, hull

option = st.builds(Option, st.integers(0, 60), st.integers(0, 1000).map(float))
item = st.lists(option, min_size=1, max_size=4)
some = st.lists(item, min_size=1, max_size=5)
many = st.lists(item, min_size=1, max_size=60)
exponents = st.builds(
    lambda cost, digits, power: Option(cost, digits * 10.0**power),
    st.integers(1, 10**10),
    st.integers(0, 999),
    st.integers(-30, 12),
)


def every(items: Sequence[Item]) -> list[Selection]:
    return list(itertools.product(*(range(len(item)) for item in items)))


@given(some, st.integers(-1, 320))
@settings(max_examples=300, deadline=None)
def test_small_cases_are_solved_exactly(items: list[Item], budget: int) -> None:
    found = allocate(items, budget)
    fits = [error_of(items, selection) for selection in every(items) if cost_of(items, selection) <= budget]
    assert (found is None) == (not fits)
    if found is not None:
        assert cost_of(items, found) <= budget
        assert error_of(items, found) == min(fits)


@given(many, st.floats(0, 1.1))
@settings(max_examples=60, deadline=None)
def test_never_over_the_budget_and_within_one_step_of_the_hulls(items: list[Item], share: float) -> None:
    least = cost_of(items, cheapest(items))
    budget = least + int(share * (sum(max(option.cost for option in item) for item in items) - least))
    found = allocate(items, budget)
    assert found is not None
    assert cost_of(items, found) <= budget
    # no selection at all is below the bound, and the greedy one is at most one step above it
    bound, step = relaxed(items, budget)
    assert bound - 1e-6 <= error_of(items, found) <= bound + step + 1e-6


def relaxed(items: Sequence[Item], budget: int) -> tuple[float, float]:
    """The least error if steps along the hulls could be taken in part, and the error of the largest step."""
    left, error = float(budget), 0.0
    steps = []
    for item in items:
        points = [item[at] for at in hull(item)]
        left -= points[0].cost
        error += points[0].error
        steps += [(a.error - b.error, b.cost - a.cost) for a, b in itertools.pairwise(points)]
    for gain, cost in sorted(steps, key=lambda step: -step[0] / step[1]):
        part = min(1.0, left / cost)
        error -= part * gain
        left -= part * cost
        if part < 1:
            break
    return error, max((gain for gain, _ in steps), default=0.0)


@given(some, st.integers(0, 300), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_more_budget_is_never_worse(items: list[Item], budget: int, more: int) -> None:
    first, second = allocate(items, budget), allocate(items, budget + more)
    if first is not None:
        assert second is not None
        assert error_of(items, second) <= error_of(items, first)


@given(item)
def test_the_hull_is_convex_and_goes_from_the_cheapest_to_the_best(options: list[Option]) -> None:
    points = [options[at] for at in hull(options)]
    assert points[0].cost == min(option.cost for option in options)
    assert points[-1].error == min(option.error for option in options)
    rates = [(a.error - b.error) / (b.cost - a.cost) for a, b in itertools.pairwise(points)]
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(rates, reverse=True)
    for option in options:  # none lies below
        for a, b in itertools.pairwise(points):
            if a.cost <= option.cost <= b.cost:
                share = (option.cost - a.cost) / (b.cost - a.cost)
                assert option.error >= a.error + share * (b.error - a.error) - 1e-9


@given(some, st.integers(0, 400), st.integers(0, 40), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_the_exact_size_is_kept_and_no_single_scheme_that_fits_is_better(
    items: list[Item], target: int, overhead: int, each: int
) -> None:
    """Files hold more than their tensors, and how much more depends on the selection."""

    def exact(selection: Selection) -> int:
        return cost_of(items, selection) + overhead + each * len(set(selection))

    singles = [tuple(min(at, len(item) - 1) for item in items) for at in range(4)]
    found = fit(items, target, exact, singles)
    if found is None:
        assert exact(cheapest(items)) > target
        assert all(exact(single) > target for single in singles)
        return
    assert exact(found) <= target
    for single in singles:
        if exact(single) <= target:
            assert error_of(items, found) <= error_of(items, single)


@given(st.lists(st.lists(exponents, min_size=1, max_size=4), min_size=1, max_size=20), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_same_numbers_give_the_same_selection(items: list[Item], share: float) -> None:
    budget = int(share * sum(max(option.cost for option in item) for item in items))
    found = allocate(items, budget)
    assert found == allocate([list(item) for item in items], budget)
    if found is not None:
        assert cost_of(items, found) <= budget


def test_five_thousand_tensors_land_close_in_seconds() -> None:
    source = random.Random(0)
    items = []
    for _ in range(5000):
        size, noise = source.choice([1, 4, 16, 64]) * 10**6, math.exp(source.gauss(0, 2))
        four, eight = Option(size // 2 + size // 32, 250 * noise), Option(size + 8192, noise)
        items.append([Option(2 * size, 0.0), four, eight, Option(size + 16384, 6 * noise)])
    least, most = cost_of(items, cheapest(items)), cost_of(items, (0,) * len(items))
    for share in (0.05, 0.4, 0.9):
        budget = least + int(share * (most - least))
        began = time.process_time()
        found = allocate(items, budget)
        assert time.process_time() - began < 20
        assert found is not None
        assert 0.999 * budget <= cost_of(items, found) <= budget
