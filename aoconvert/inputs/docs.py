"""Arguments as the docstring of a forward describes them: ``name (`torch.Tensor` of shape `(batch_size, tokens, 3)`)``.

A size that is named twice is the same in both places, which no other hint says.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .blanks import Blank, State
from .facts import Facts
from .guesses import TOKENS, guesses

_SHAPE = re.compile(r"[\[(]((?:[\w.*+/ -]+,)+[\w.*+/ -]*)[\])]")
_SIZES = (  # the first that fits: a part of a name, and what a size of that name is where nothing else tells
    (re.compile(r"patch|image|vision|img"), 16),
    (re.compile(r"height|width|^[hw]$"), 16),
    (re.compile(r"frame|^[tf]$|time"), 4),
)


def read_docstring(facts: Facts, doc: str | None, names: list[str]) -> State | None:
    """A start with the shapes that a docstring gives; ``None`` where it gives none.

    Args:
        facts: of the model.
        doc: of its forward.
        names: of the arguments that are wanted.
    """
    sections = _sections(inspect.cleandoc(doc or "").partition("\nReturn")[0], list(facts.parameters))
    sizes: dict[str, int] = {}
    state: dict[str, Any] = {}
    found = False
    for name in names:
        usual = guesses(facts, name)
        section = sections.get(name, "")
        symbols = _symbols(section)
        if symbols is None:
            state[name] = usual[0] if usual else Blank((1,))
            continue
        found = True
        state[name] = _describe(facts, section, symbols, [one for one in usual if isinstance(one, Blank)], sizes)
    return state if found else None


def lay_out(facts: Facts, text: str, usual: Blank) -> Iterator[Blank]:
    """A tensor in each layout that an error names: ``(batch_size, 2, num_channels, height, width)``."""
    for found in _SHAPE.finditer(text):
        symbols = [symbol.strip() for symbol in found[1].split(",") if symbol.strip()]
        if len(symbols) > 1 and not all(symbol.isdigit() for symbol in symbols):
            yield _describe(facts, "", symbols, [usual], {})


def _sections(doc: str, names: list[str]) -> Mapping[str, str]:
    """What the docstring says of each argument."""
    starts = [(found.start(), name) for name in names if (found := re.search(rf"^\s*{name}\s*[(:]", doc, re.M))]
    starts.sort()
    ends = [*(start for start, _ in starts), len(doc)][1:]
    return {name: doc[start:end] for (start, name), end in zip(starts, ends, strict=True)}


def _symbols(section: str) -> list[str] | None:
    """The sizes of the first shape in it, as they are named."""
    head = section.partition("\n\n")[0]
    for found in _SHAPE.finditer(head.partition("(")[2] if "(" in head.partition("\n")[0] else head):
        symbols = [symbol.strip() for symbol in found[1].split(",") if symbol.strip()]
        if symbols and re.match(r"batch|b(s|sz)?$|bz$|n$|\d+$|num_|total|seq|tokens?$", symbols[0].lower()):
            return symbols
    return None


def _describe(facts: Facts, section: str, symbols: list[str], usual: list[Blank], sizes: dict[str, int]) -> Blank:
    """A tensor of that shape, of the kind that is usual for the argument or that the text says."""
    alike = next((one for one in usual if len(one.shape) == len(symbols)), None)
    shape = tuple(
        _size(facts, symbol, alike.shape[axis] if alike is not None else None, axis, sizes)
        for axis, symbol in enumerate(symbols)
    )
    first = alike or (usual[0] if usual else Blank(()))
    head = section[:400]
    if re.search(r"\bbool\b|BoolTensor|[`\s]true\b", head, re.IGNORECASE) and first.kind in ("normal", "mask", "bool"):
        return Blank(shape, "bool")
    if re.search(r"LongTensor|int64|IntTensor|torch\.long", head) and first.floating:
        return Blank(shape, "long")
    return replace(first, shape=shape) if first.kind != "given" else first


def _size(facts: Facts, symbol: str, usual: int | None, axis: int, sizes: dict[str, int]) -> int:
    name = re.sub(r"config\.|self\.", "", symbol).strip("` ")
    if name.isdigit():
        return int(name)
    if axis == 0 and re.match(r"batch|b(s|sz)?$|bz$|n$", name.lower()):
        return 1
    plain = re.fullmatch(r"\w+", name)
    if plain and (number := facts.number(name)) and not re.match(r"height|width|image_size", name):
        return number
    if name not in sizes:
        guess = next((size for pattern, size in _SIZES if pattern.search(name.lower())), TOKENS)
        sizes[name] = usual if usual is not None and usual > 1 else guess
    return sizes[name]
