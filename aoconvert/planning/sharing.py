"""What several plans of one source have in common, such as its headers and its empty models: it is found once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar, cast

from aoconvert.errors import AoconvertError
from aoconvert.options import QuantizeOptions

T = TypeVar("T")

_OF_ONE_PLAN = frozenset(
    {
        "scheme",
        "group_size",
        "settings",
        "recipe",
        "candidates",
        "min_sqnr",
        "target_bits",
        "target_size",
        "sensitivity",
        "skip",
        "components",
        "include_embeddings",
        "default_skips",
        "carry",
        "device",
        "layout_device",
        "max_shard_size",
        "format",
        "min_quantized",
        "output",
        "overwrite",
        "resume",
    }
)
"""Options that change nothing about how a source is read and opened. One that is missing here costs time, no more."""


class Shared:
    """Remembers what was found for one source, for as long as its plans are made; nothing of it may be changed."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], tuple[object, AoconvertError | None]] = {}

    def once(self, options: QuantizeOptions, what: tuple[object, ...], make: Callable[[], T]) -> T:
        """Give what ``make`` gave, or raise what it raised, when it was first asked for.

        Args:
            options: of the plan; those that decide about the source must be the same.
            what: names it, with everything beside the options that it depends on.
            make: finds it.

        Raises:
            AoconvertError: as ``make`` does.
        """
        names = (field.name for field in fields(options) if field.name not in _OF_ONE_PLAN)
        key = (*what, *(repr(getattr(options, name)) for name in names))
        if key not in self._found:
            try:
                self._found[key] = (make(), None)
            except AoconvertError as error:
                self._found[key] = (None, error)
        found, refusal = self._found[key]
        if refusal is not None:
            raise refusal
        return cast(T, found)
