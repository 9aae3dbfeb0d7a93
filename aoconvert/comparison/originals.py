"""A checkpoint's source under the checkpoint's names: renamed, merged and tied as the library does it on loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.comparison.opening import Side, SidePart
from aoconvert.comparison.reading import ReadLeaf
from aoconvert.comparison.tensors import StoredTensor, row_major
from aoconvert.engine.read import ComponentReading
from aoconvert.errors import AoconvertError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.options import HubOptions
from aoconvert.planning.types import ComponentPlan, TensorPlan
from aoconvert.sources import resolve
from aoconvert.verification.numbers import open_originals


@contextmanager
def as_named(checkpoint: Side, part: SidePart, source: Side, original: SidePart, hub: HubOptions) -> Iterator[SidePart]:
    """A part of the source as the checkpoint names it; as its files name it where that is not known.

    Args:
        checkpoint, part: what aoconvert wrote.
        source, original: what may be its source.
        hub: how to ask for a Hub repo.
    """
    if not _helps(checkpoint, part, source, original):
        yield original
        return
    with ExitStack() as stack:
        try:
            assert checkpoint.manifest is not None
            assert part.entry is not None
            target = from_manifest(checkpoint.source.root, checkpoint.manifest)
            wanted = next(item for item in target.parts if item.folder == part.entry.path)
            opened = open_originals(resolve(source.label, hub), wanted, part.entry, part.tensors)
            plan, reading = stack.enter_context(opened)
            named = _describe(plan, reading, part)
        except AoconvertError:  # another model: its own names say what differs
            yield original
            return
        yield named


def _helps(checkpoint: Side, part: SidePart, source: Side, original: SidePart) -> bool:
    """Whether one is a checkpoint by aoconvert, and the other an original whose names are not the same."""
    if part.entry is None or original.entry is not None or source.is_file or checkpoint.is_file:
        return False
    plain = all(tensor.is_plain for tensor in original.tensors.values())
    return plain and part.tensors.keys() != original.tensors.keys()


def _describe(plan: ComponentPlan, reading: ComponentReading, part: SidePart) -> SidePart:
    apart = [tensor for tensor in plan.tensors if tensor.action != "tied"]
    tensors = {tensor.name: _original(tensor, reading) for tensor in apart if tensor.name in part.tensors}
    others = [tensor.name for tensor in apart if tensor.name not in part.tensors]
    dropped = (*others, *(item.name for item in plan.dropped))
    return SidePart(plan.component.class_name, tensors, dropped=dropped)


def _original(tensor: TensorPlan, reading: ComponentReading) -> StoredTensor:
    def read(rows: tuple[int, int] | None) -> torch.Tensor:
        return reading.read(tensor, rows, None)

    # what a quantized original is dequantized to, its reader knows
    dtype = read((0, 1) if tensor.shape and tensor.shape[0] else None).dtype
    nbytes = torch.Size(tensor.shape).numel() * dtype.itemsize
    name, steps = dtype_name(dtype), row_major(tensor.shape)
    leaf = ReadLeaf(Path(), name, tensor.shape, 0, nbytes, steps, read)
    return StoredTensor("Tensor", name, tensor.shape, {"": leaf})
