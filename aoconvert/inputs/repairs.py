"""What to change after a pass has failed: read off the error's message and the lines of code that it passed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .blanks import Blank, Given, Path, State, tensors
from .docs import lay_out
from .edits import WORD, find_mentioned, in_turn, order_by_mention, put
from .facts import Facts
from .guesses import guesses
from .sizes import enlarge, fit_layer, fit_message, lengthen, try_numbers
from .trial import Attempt

_UNPACKED = re.compile(r"([\w*]+(?:\s*,\s*[\w*]+)+)\s*=\s*(\w+)\.(?:shape|size\(\))")
_LONGEST = 32  # items of a list
_LARGEST = 1 << 21  # elements of one input


def repairs(facts: Facts, state: State, failed: Attempt) -> Iterator[State]:
    """Other arguments to try, the likeliest first.

    Args:
        facts: of the model.
        state: the arguments that failed.
        failed: how.
    """
    for found in _all(facts, state, failed):
        if all(math.prod(blank.shape) <= _LARGEST and 0 not in blank.shape for _, blank in tensors(found)):
            yield found


def _all(facts: Facts, state: State, failed: Attempt) -> Iterator[State]:
    message = str(failed.error)
    wild = in_turn(
        _others(facts, state, failed),
        enlarge(state),
        _optional(facts, state, failed),
        try_numbers(state, failed, message),
    )
    yield from in_turn(
        _keys(facts, state, failed, message),
        _fill_absent(facts, state, failed, message),
        _kinds(state, failed, message),
        _fillers(facts, state, message),
        _choices(facts, state, message),
        lengthen(facts, state, failed, message),
        _layouts(facts, state, failed, message),
        _in_range(state, failed, message),
        fit_layer(state, failed),
        _lists(facts, state, message),
        _ranks(facts, state, failed, message),
        fit_message(state, failed, message),
        wild,
    )


def _keys(facts: Facts, state: State, failed: Attempt, message: str) -> Iterator[State]:
    """An argument that is a dict lacks a key."""
    if not isinstance(failed.error, (KeyError, ValueError, TypeError)):
        return
    names = re.findall(r"[`']([a-z]\w*)[`']", message)
    for holder in (name for name, value in state.items() if isinstance(value, dict)):
        for key in (key for key in names if key != holder and key not in facts.parameters):
            if state[holder].get(key) is None:
                for guess in guesses(facts, key)[:3]:
                    others = {k: v for k, v in state[holder].items() if v is not None}
                    yield {**state, holder: {**others, key: guess}}


def _fill_absent(facts: Facts, state: State, failed: Attempt, message: str) -> Iterator[State]:
    """An argument that was left out is wanted."""
    missing = [name for name in facts.parameters if state.get(name) is None and not _instead(facts, name)]
    absent = {name for frame in failed.frames for name in frame.absent}
    in_message = [name for name in WORD.findall(message) if name in missing]
    in_code = [name for name in find_mentioned(failed) if name in missing and name in absent]
    wanted = re.search("None|missing .* argument", message) or in_message
    for name in dict.fromkeys([*in_message, *(in_code if wanted else ())]):
        for guess in guesses(facts, name)[:4]:
            yield {**state, name: guess}
    if "must be a mapping, not NoneType" in message:  # spread without a look at whether it is there
        for name in (name for name in missing if "dict" in str(facts.parameters[name].annotation).lower()):
            yield {**state, name: {}}
    for holder, value in state.items():  # a dict's value that is None
        if isinstance(value, dict) and wanted:
            for key in [key for key, item in value.items() if item is None]:
                for guess in guesses(facts, key)[:2]:
                    yield {**state, holder: {**value, key: guess}}


def _kinds(state: State, failed: Attempt, message: str) -> Iterator[State]:
    """Integers are wanted where there are fractions, or the other way round."""
    wants_long = re.search(
        r"\bLong\b|integer|integral|indices|Int\b|embedding|one_hot|index tensor|used as indices", message
    )
    if wants_long and re.search(r"[Ff]loat|integral|Half|BFloat16|scalar type|dtype", message):
        for path, blank in order_by_mention(state, failed):
            if blank.floating:
                yield put(state, path, replace(blank, kind="mask"))
    if re.search(r"dtype|scalar type|integral|Float|Long|Bool|bool", message):
        yield from _all_masks(state)
        for path, blank in order_by_mention(state, failed):
            for kind in ("normal", "bool", "mask", "float32"):
                if kind != blank.kind and blank.kind != "ids":
                    yield put(state, path, replace(blank, kind=kind))


def _all_masks(state: State) -> Iterator[State]:
    """All masks are of another kind: two of them may be multiplied."""
    masks = [(path, blank) for path, blank in tensors(state) if blank.kind == "mask"]
    for kind in ("normal", "bool") if len(masks) > 1 else ():
        changed = state
        for path, blank in masks:
            changed = put(changed, path, replace(blank, kind=kind))
        yield changed


def _fillers(facts: Facts, state: State, message: str) -> Iterator[State]:
    """A text wants as many tokens for an image as there are features of it."""
    found = re.search(r"tokens:?\s*=?\s*(\d+)\D+features:?\s*(?:\w+\s*)?\D*(\d+)", message)
    if not found:
        return
    count = int(found[2])
    ids = {key: value for _, key, value in facts.values if re.search(r"(image|video|audio)\w*_token_(id|index)$", key)}
    for key, token in ids.items():
        if not isinstance(token, int) or not 0 <= token < facts.vocabulary:
            continue
        kind = key.partition("_")[0]
        if kind not in message.lower() and kind == "video":
            continue
        for path, blank in tensors(state):
            if blank.kind == "ids" and path[0] == "input_ids":
                yield put(state, path, replace(blank, shape=(1, count + 3), run=count, filler=token))


def _choices(facts: Facts, state: State, message: str) -> Iterator[State]:
    """An argument is one of a few words, which the error names."""
    words = re.findall(r"['\"`]([a-z][\w-]*)['\"`]", message)
    for name in [name for name in words if name in facts.parameters and not isinstance(state.get(name), Mapping)]:
        if "Tensor" not in str(facts.parameters[name].annotation):
            yield from ({**state, name: word} for word in words if word not in facts.parameters)


def _in_range(state: State, failed: Attempt, message: str) -> Iterator[State]:
    """Indices reach beyond what they are into: the first of it is always there."""
    if not re.search(r"index out of range|out of bounds|index_select|IndexError", f"{type(failed.error)} {message}"):
        return
    kinds = ("ids", "mask", "positions")
    whole = [(path, blank) for path, blank in order_by_mention(state, failed) if blank.kind in kinds]
    for path, blank in whole:
        yield put(state, path, replace(blank, kind="long"))
    changed = state
    for path, blank in whole:
        if blank.kind in ("positions", "mask"):
            changed = put(changed, path, replace(blank, kind="long"))
    yield changed


def _layouts(facts: Facts, state: State, failed: Attempt, message: str) -> Iterator[State]:
    """A tensor in the layout that the error gives in words."""
    for path, blank in order_by_mention(state, failed):
        for other in lay_out(facts, message, blank):
            if other.shape != blank.shape:
                yield put(state, path, other)


def _ranks(facts: Facts, state: State, failed: Attempt, message: str) -> Iterator[State]:
    """A tensor has too few axes, or too many."""
    misfit = failed.misfit
    bad_axes = misfit is not None and misfit.axes and misfit.axes != len(misfit.shape)
    if not bad_axes and not re.search(
        r"unpack|indices|[1-6]-?[Dd]\b|dimensions|axes|\brank|out of range|permute|\bdims\b|einsum|Wrong shape", message
    ):
        return
    wanted = [misfit.axes] if misfit is not None and bad_axes else []
    wanted += [int(size) for size in re.findall(r"\b([1-6])-?[Dd]\b", message)]
    wanted += [
        int(size) for size in re.findall(r"expected (\d)|be (\d)-dim|(\d) dim", message) for size in size if size
    ]
    for frame in failed.frames:
        if unpacked := _UNPACKED.search(frame.line):
            names = [name.strip() for name in unpacked[1].split(",")]
            if not any(name.startswith("*") for name in names):
                wanted.insert(0, len(names))
                yield from _by_names(state, frame.shapes.get(unpacked[2]), unpacked[2], names)
    for path, blank in order_by_mention(state, failed):
        for guess in _tensor_guesses(facts, path):
            if len(guess.shape) != len(blank.shape) and (not wanted or len(guess.shape) in wanted):
                yield put(state, path, guess)
    yield from _all_without_batch(state)
    for path, blank in order_by_mention(state, failed):
        if blank.shape and blank.shape[0] == 1 and len(blank.shape) > 1:
            yield put(state, path, replace(blank, shape=blank.shape[1:]))
        longer = [(1, *blank.shape), (*blank.shape[:1], 1, *blank.shape[1:])]
        for shape in reversed(longer) if len(path) > 1 else longer:  # in a list there is no axis for the batch
            yield put(state, path, replace(blank, shape=shape))


def _all_without_batch(state: State) -> Iterator[State]:
    """Tensors that are alike have no axis for the batch: indices of several streams, say."""
    alike: dict[tuple[Any, ...], list[Path]] = {}
    for path, blank in tensors(state):
        if len(blank.shape) > 1 and blank.shape[0] == 1:
            alike.setdefault((blank.kind, len(blank.shape)), []).append(path)
    for paths in alike.values():
        changed = state
        for path in paths if len(paths) > 1 else ():
            blank = dict(tensors(changed))[path]
            changed = put(changed, path, replace(blank, shape=blank.shape[1:]))
        yield changed


def _by_names(state: State, shape: tuple[int, ...] | None, variable: str, names: list[str]) -> Iterator[State]:
    """A tensor in the layout that the code unpacks: its names tell channels, frames, height and width."""
    for path, blank in tensors(state):
        if blank.shape != shape and path[0] != variable:
            continue
        channels, side = _channels_and_side(blank)
        sizes = []
        for place, name in enumerate(names):
            if place == 0 and len(names) > 1:
                sizes.append(1)
            elif re.search(r"chan|^c$|^_?c_|in_c|dim|hidden|embed", name):
                sizes.append(channels)
            elif re.search(r"frame|time|^[ftd]$|temporal", name):
                sizes.append(4)
            else:
                sizes.append(side)
        yield put(state, path, replace(blank, shape=tuple(sizes)))


def _channels_and_side(blank: Blank) -> tuple[int, int]:
    if len(blank.shape) >= 4:
        image = blank.shape[-3] if len(blank.shape) == 4 else min(blank.shape[1:3])
        return image, blank.shape[-1]
    return (blank.shape[-1] if blank.shape else 1), 16


def _lists(facts: Facts, state: State, message: str) -> Iterator[State]:
    """A list is too short, or a tensor should be one."""
    layers = facts.number("num_layers", "num_hidden_layers", "depth", default=2)
    for name, value in state.items():
        if isinstance(value, list) and value and isinstance(value[0], Blank):
            yield {**state, name: []}
        if isinstance(value, list) and 0 < len(value) <= _LONGEST and re.search("index|range|len|unpack", message):
            for count in dict.fromkeys((2 * len(value), layers, layers + facts.number("num_single_layers"))):
                yield {**state, name: (value * count)[:count]}
        if isinstance(value, Blank) and re.search("list|iterable|tuple|sequence|has no len", message):
            yield {**state, name: [value]}
            yield {**state, name: [replace(value, shape=value.shape[1:])]}


def _others(facts: Facts, state: State, failed: Attempt) -> Iterator[State]:
    """Whatever else an argument may be, those first that the failing lines name."""
    names = list(dict.fromkeys([path[0] for path, _ in order_by_mention(state, failed)]))
    for name in names + [name for name in state if name not in names and not isinstance(state[name], Given)]:
        for guess in guesses(facts, name):
            if guess != state[name]:
                yield {**state, name: guess}


def _instead(facts: Facts, name: str) -> bool:
    """Whether an argument only takes the place of a part of the model: of its embeddings, of its encoder."""
    ids = name.removesuffix("inputs_embeds") + "input_ids"
    return name == "encoder_outputs" or (name.endswith("inputs_embeds") and ids in facts.parameters)


_LEFT_OUT = re.compile(
    r"output_.*|return_.*|use_cache|past_key_values|.*labels?|cache.*|.*_mask|generator|start_.*|end_.*|.*_kwargs"
)


def _optional(facts: Facts, state: State, failed: Attempt) -> Iterator[State]:
    """Arguments that may be left out, those first that the failing lines name."""
    missing = [name for name in facts.parameters if state.get(name) is None and not _LEFT_OUT.fullmatch(name)]
    missing = [name for name in missing if not _instead(facts, name)]
    named = [name for name in find_mentioned(failed) if name in missing]
    tensor = {name: guesses(facts, name)[:1] for name in missing if "Tensor" in str(facts.parameters[name].annotation)}
    if len(tensor) > 1:  # those that only serve together
        yield {**state, **{name: found[0] for name, found in tensor.items() if found}}
    for name in dict.fromkeys([*named, *missing]):
        for guess in guesses(facts, name)[:1]:
            yield {**state, name: guess}


def _tensor_guesses(facts: Facts, path: Path) -> list[Blank]:
    name = next((part for part in reversed(path) if isinstance(part, str)), str(path[0]))
    return [guess for guess in guesses(facts, name) if isinstance(guess, Blank)]
