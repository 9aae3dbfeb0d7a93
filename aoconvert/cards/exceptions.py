"""What did not go the usual way: tensors carried over, missing or dropped, parts not quantized, files left behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from aoconvert.cards.layers import patterns
from aoconvert.checkpoint.manifest import Manifest

FOLDED_FROM = 12  # rows; a longer list is folded
_MOST = 200  # rows of a kind


def apart(manifest: Manifest) -> list[dict[str, Any]]:
    """One row for each pattern of names, or file, and reason: ``what``, ``name``, ``count``, ``reason``."""
    return [
        {"what": what, "name": name, "count": count, "reason": reason} for what, name, count, reason in _rows(manifest)
    ]


def _rows(manifest: Manifest) -> Iterator[tuple[str, str, int, str]]:
    for entry in manifest.components:
        prefix = f"{entry.name}." if entry.name and len(manifest.components) > 1 else ""
        carried = [(tensor.name, tensor.reason or "") for tensor in entry.tensors if tensor.action == "carry"]
        quantized = [(t.name, t.reason) for t in entry.tensors if t.action == "quantize" and t.reason]
        missing = [(tensor.name, tensor.reason) for tensor in entry.missing]
        dropped = [(tensor.name, tensor.reason) for tensor in entry.dropped]
        kinds = (
            ("quantized", quantized),
            ("carried over", carried),
            ("not in the files", missing),
            ("left out", dropped),
        )
        for what, tensors in kinds:
            yield from _cut(what, [(prefix + name, count, reason) for name, count, reason in _group(tensors)])
    for part in manifest.unquantized:
        yield "unchanged", part.name, len(part.tensors), f"{part.class_name}, its tensors bit for bit"
    yield from _cut("not copied", [(item.path, 1, item.reason) for item in manifest.left_behind])


def _group(tensors: Iterable[tuple[str, str]]) -> list[tuple[str, int, str]]:
    """Patterns of names, how many each stands for, and the reason, in order."""
    named = list(tensors)
    shown = patterns(name for name, _ in named)
    groups: defaultdict[tuple[str, str], int] = defaultdict(int)
    for name, reason in named:
        groups[shown[name], reason] += 1
    return [(pattern, count, reason) for (pattern, reason), count in groups.items()]


def _cut(what: str, rows: list[tuple[str, int, str]]) -> Iterator[tuple[str, str, int, str]]:
    for name, count, reason in rows[:_MOST]:
        yield what, name, count, reason
    if len(rows) > _MOST:
        rest = rows[_MOST:]
        yield what, f"and {len(rest)} more", sum(count for _, count, _ in rest), "all are in aoconvert.json"
