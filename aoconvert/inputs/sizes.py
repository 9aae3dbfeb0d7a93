"""Repairs of sizes: inputs of another length, width or number of channels, as a layer or the error's message wants."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from .blanks import Blank, State, tensors
from .edits import in_turn, order_by_mention, put
from .facts import Facts
from .trial import Attempt

_PAIRS = (
    r"shapes cannot be multiplied \((?:\d+)x(?P<got>\d+) and (?P<want>\d+)x",
    r"to have (?P<want>\d+) channels, but got (?P<got>\d+)",
    r"tensor a \((?P<got>\d+)\) must match the size of tensor b \((?P<want>\d+)\)",
    r"Expected size (?P<want>\d+) but got size (?P<got>\d+)",
    r"normalized_shape=\[(?P<want>\d+)\].*input of size\[.*?(?P<got>\d+)\]",
    r"[Ee]xpected (?:\w+ )*?(?P<want>\d+),? (?:but )?got (?P<got>\d+)",
    r"size \((?P<want>\d+)\) must match the existing size \((?P<got>\d+)\)",
    r"got (?P<got>\d+).*?(?:but )?expected (?P<want>\d+)",
)
_SHAPE = re.compile(r"\[((?:\d+|\*)(?:, (?:\d+|\*))*)\]")


def fit_layer(state: State, failed: Attempt) -> Iterator[State]:
    """A layer of torch's wants another size along one axis."""
    misfit = failed.misfit
    if misfit is None or misfit.got == misfit.want or misfit.got == 0:
        return
    same = [(path, blank) for path, blank in order_by_mention(state, failed) if blank.shape == misfit.shape]
    for path, blank in same:
        axis = 1 if misfit.axes and len(blank.shape) > 1 else len(blank.shape) - 1
        if blank.shape[axis] == misfit.got:
            yield put(state, path, _resize_axis(blank, axis, misfit.want))
        if misfit.want in blank.shape:  # the axes are in another order
            other = blank.shape.index(misfit.want)
            shape = list(blank.shape)
            shape[axis], shape[other] = shape[other], shape[axis]
            yield put(state, path, replace(blank, shape=tuple(shape)))
    yield from _resize(state, failed, misfit.got, misfit.want)
    yield from _scale(state, failed, misfit.got, misfit.want)


def lengthen(facts: Facts, state: State, failed: Attempt, message: str) -> Iterator[State]:
    """Something is counted that there is not enough of: layers of a text encoder, places in a sequence."""
    found = re.search(r"index (\d+) is out of bounds for dimension (\d+) with size (\d+)", message)
    if not found:
        return
    index, axis, size = (int(number) for number in found.groups())
    short = [(p, blank) for p, blank in order_by_mention(state, failed) if blank.shape[axis : axis + 1] == (size,)]
    for path, blank in short:
        layers = facts.number("num_layers", "num_hidden_layers", default=1)
        for count in dict.fromkeys((index + 1, layers + 1, 4 * (index + 1))):
            if count > size:
                yield put(state, path, _resize_axis(blank, axis, count))
    for count in (index + 1, 4 * (index + 1)):
        yield from _resize_all(state, failed, size, count)


def fit_message(state: State, failed: Attempt, message: str) -> Iterator[State]:
    """Sizes that do not fit: what the message says there is, and what it says there should be."""
    pairs = list(dict.fromkeys(_read_pairs(message)))
    yield from in_turn(*(in_turn(_resize(state, failed, *pair), _scale(state, failed, *pair)) for pair in pairs))
    for frame in failed.frames[:3]:
        if "==" in frame.line or "!=" in frame.line:
            numbers = [int(number) for number in re.findall(r"(?<![\w.])(\d+)(?![\w.])", frame.line)][:4]
            sizes = sorted({size for _, blank in tensors(state) for size in blank.shape})
            for got, want in ((a, b) for a in sizes for b in numbers if a != b > 1):
                yield from _resize(state, failed, got, want)


def try_numbers(state: State, failed: Attempt, message: str) -> Iterator[State]:
    """Any number of the message in the place of any other."""
    for pair in list(dict.fromkeys(_list_pairs(message)))[:60]:
        yield from _resize(state, failed, *pair)


def enlarge(state: State) -> Iterator[State]:
    """Images, clips and sounds of other sizes: what halves them on the way may leave nothing."""
    for times in (2, 4, 8):
        for path, blank in tensors(state):
            if len(blank.shape) == 5:  # frames: so many times as many, and those after the first
                for axis in (2, 1):
                    for count in (times * (blank.shape[axis] - 1) + 1, times * blank.shape[axis]):
                        yield put(state, path, _resize_axis(blank, axis, count))
            if len(blank.shape) >= 4:
                yield put(
                    state, path, replace(blank, shape=(*blank.shape[:-2], *(times * s for s in blank.shape[-2:])))
                )
            elif len(blank.shape) == 3:
                yield put(state, path, _resize_axis(blank, 2, times * blank.shape[2]))
                yield put(state, path, _resize_axis(blank, 1, times * blank.shape[1]))


def _resize_axis(blank: Blank, axis: int, size: int) -> Blank:
    return replace(blank, shape=(*blank.shape[:axis], size, *blank.shape[axis + 1 :]))


def _resize_axes(blank: Blank, got: int, want: int) -> Blank:
    return replace(blank, shape=tuple(want if size == got else size for size in blank.shape))


def _read_pairs(message: str) -> Iterator[tuple[int, int]]:
    if "broadcast" in message and len(shapes := [found[1].split(", ") for found in _SHAPE.finditer(message)]) == 2:
        for got, want in zip(reversed(shapes[0]), reversed(shapes[1]), strict=False):
            if got != want and "1" not in (got, want):
                yield int(got), int(want)
                yield int(want), int(got)
    for pattern in _PAIRS:
        if found := re.search(pattern, message):
            yield int(found["got"]), int(found["want"])
            yield int(found["want"]), int(found["got"])


def _list_pairs(message: str) -> Iterator[tuple[int, int]]:
    numbers = [int(number) for number in re.findall(r"\d+", message)][:12]
    for place, got in enumerate(numbers):
        for want in numbers[place + 1 :] + numbers[:place]:
            if got != want and got > 0 and want > 0:
                yield got, want


def _resize(state: State, failed: Attempt, got: int, want: int) -> Iterator[State]:
    having = [
        (path, blank)
        for path, blank in order_by_mention(state, failed)
        if got in blank.shape and (got > 1 or len(blank.shape) == 1)
    ]
    for path, blank in having:
        yield put(state, path, _resize_axes(blank, got, want))
    for path, blank in having:
        if blank.shape.count(got) > 1:
            for axis in (axis for axis, size in enumerate(blank.shape) if size == got):
                yield put(state, path, _resize_axis(blank, axis, want))
    yield from _resize_all(state, failed, got, want)


def _resize_all(state: State, failed: Attempt, got: int, want: int) -> Iterator[State]:
    """All tensors that have a size get another one together."""
    having = [(path, blank) for path, blank in order_by_mention(state, failed) if got in blank.shape]
    if len(having) > 1:
        changed = state
        for path, blank in having:
            changed = put(changed, path, _resize_axes(blank, got, want))
        yield changed


def _scale(state: State, failed: Attempt, got: int, want: int) -> Iterator[State]:
    """Sizes that were multiplied or joined on the way: of all that have one, and of one tensor."""
    for size in dict.fromkeys(size for _, blank in order_by_mention(state, failed) for size in blank.shape if size > 1):
        if 0 < size + want - got < 1 << 14:
            yield from _resize_all(state, failed, size, size + want - got)
    for path, blank in order_by_mention(state, failed):
        for axis, size in enumerate(blank.shape):
            if axis == 0 and size == 1:
                continue
            for new in {size * want // got if got and size * want % got == 0 else 0, size + want - got}:
                if new > 0 and new != size and new < 1 << 14:
                    yield put(state, path, _resize_axis(blank, axis, new))
        if len(blank.shape) >= 4 and blank.shape[-1] == blank.shape[-2]:  # both sides of an image
            root = (blank.shape[-1] ** 2 * want / max(got, 1)) ** 0.5
            if root == int(root) and 0 < root < 1 << 11:
                yield put(state, path, replace(blank, shape=(*blank.shape[:-2], int(root), int(root))))
