"""What repairs have in common: one change of the arguments, and which tensors an error speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .blanks import Blank, Path, State, replace_at, tensors
from .trial import Attempt

WORD = re.compile(r"[A-Za-z_]\w*")


def in_turn(*sources: Iterator[State]) -> Iterator[State]:
    """Take one of each source in turn, until all are used up."""
    left = list(sources)
    while left:
        for source in list(left):
            try:
                yield next(source)
            except StopIteration:
                left.remove(source)


def find_mentioned(failed: Attempt) -> list[str]:
    """List the names in the failing lines of code, the innermost first, and then in those around them."""
    lines = [*(frame.line for frame in failed.frames), *(frame.around for frame in failed.frames)]
    return list(dict.fromkeys(word for line in lines for word in WORD.findall(line)))


def order_by_mention(state: State, failed: Attempt) -> list[tuple[Path, Blank]]:
    """Order the tensors: first those whose names or shapes are found in the failing lines."""
    rank = {word: index for index, word in enumerate(find_mentioned(failed))}
    return sorted(tensors(state), key=lambda item: min(rank.get(str(part), len(rank)) for part in item[0]))


def put(state: State, path: Path, blank: Any) -> State:
    """Replace the tensor at a path of the arguments; one whose values are given stays as it is."""
    if blank.kind == "given":
        return state
    return {**state, path[0]: replace_at(state[path[0]], path[1:], blank)}
