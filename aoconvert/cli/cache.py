"""``aoconvert cache``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import Output
from aoconvert.humanize import plural, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from aoconvert.cache import Kept

EXAMPLES = """\b
Examples:
  aoconvert cache
  aoconvert cache --clear
"""


@click.command("cache", epilog=EXAMPLES)
@click.option("--clear", is_flag=True, help="Delete everything in the cache; aoconvert recreates what it needs.")
@common
def command(*, clear: bool, out: Output) -> None:
    """Show where aoconvert's cache is and how large it is, or clear it.

    It holds compiled kernels, what is known of model classes, and what the originals of evaluations gave: of that at
    most AOCONVERT_CACHE_LIMIT (20GB); what was not used for longest goes first. AOCONVERT_CACHE_DIR puts the cache
    elsewhere; empty, it switches it off. Downloaded models are in the Hub's cache, which 'hf cache' looks after.
    """
    from aoconvert import cache
    from aoconvert.evaluation import references

    limits = {references.KIND: references.read_limit()}
    place = cache.root()
    kept = cache.contents()
    if clear:
        cache.clear()
    data = {
        "path": str(place) if place is not None else None,
        "bytes": sum(kind.nbytes for kind in kept),
        "kinds": [
            {"name": kind.name, "files": kind.files, "bytes": kind.nbytes, "limit": limits.get(kind.name)}
            for kind in kept
        ],
        "cleared": clear,
    }
    out.result(lambda: _table(str(place or "off"), kept, limits, clear), data, str(place or ""))


def _table(place: str, kept: tuple[Kept, ...], limits: Mapping[str, int], cleared: bool) -> RenderableType:
    kinds = [
        (
            kind.name,
            f"{plural(kind.files, 'file')}, {size(kind.nbytes)}"
            + (f" (at most {size(limits[kind.name])})" if kind.name in limits else ""),
        )
        for kind in kept
    ]
    total = size(sum(kind.nbytes for kind in kept))
    return Output.table([("cache", place), *kinds, ("cleared" if cleared else "in all", total)])
