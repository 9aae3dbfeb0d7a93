"""A migrated checkpoint against the old one that it was made of, by the reader that migrated it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import torch

from aoconvert.checkpoint.manifest import ComponentEntry, Manifest, TensorEntry
from aoconvert.errors import AoconvertError
from aoconvert.formats.base import StoredFile
from aoconvert.formats.content import content_sha256
from aoconvert.models import identify
from aoconvert.options.migrate import MigrateOptions
from aoconvert.rewriting.migrate import KINDS, single_file
from aoconvert.rewriting.migrate_types import OldTensor, OldWeights
from aoconvert.rewriting.old_torchao.weights import TorchaoWeights
from aoconvert.schemes.tensors import dequantize, repair
from aoconvert.sources import Source, find_weights

_PACKED_ON = "--packed-on"
_CPUS = ("avx512", "avx2", "generic")


def open_old(source: Source, entry: ComponentEntry, command: str) -> OldWeights | None:
    """The old weights that a component was made of; ``None`` where the source holds none.

    Args:
        source: what it is compared with.
        entry: of the component.
        command: that made it, as the manifest has it: which CPU had packed int4 only the user knew.

    Raises:
        AoconvertError: the source cannot be read.
    """
    if entry.migrated is None:
        return None
    options = MigrateOptions(packed_on=_packed_on(command))
    if entry.library == "torch":
        path = single_file(source)
        return None if path is None else TorchaoWeights(source, [path], options.packed_on)
    layout = identify(source)
    component = layout.component(entry.name if layout.kind == "pipeline" else "")
    files = find_weights(source, component.folder, component.library, config=component.config) if component else None
    if component is None or files is None:
        return None
    source.fetch(files.paths)
    return next((found for kind in KINDS if (found := kind(source, component, files, options)) is not None), None)


def is_old(source: Source, manifest: Manifest) -> bool:
    """Whether a source is an old checkpoint, which no library of today opens, and the manifest's was made of one."""
    for entry in manifest.components:
        try:
            old = open_old(source, entry, manifest.run.command)
        except AoconvertError:  # the comparison will say it
            continue
        if old is not None:
            old.close()
            return True
    return False


def compare_with_old(
    weights: OldWeights, tensors: Iterable[TensorEntry], found: dict[str, StoredFile]
) -> Iterator[tuple[str, str | None]]:
    """The name of each tensor that was compared, and what differs; the old weights are closed then.

    What was carried over must have the same codes and scales as are stored there, what was dequantized their values,
    and what was quantized again the error that the manifest states.

    Args:
        weights: of the old checkpoint.
        tensors: what the manifest says of the new one's.
        found: its open files by the names of tensors.
    """
    with closing(weights):
        held = {tensor.name: tensor for tensor in weights.tensors}
        for entry in tensors:
            if entry.name not in found:
                continue
            old = held.get(entry.name)
            if old is None:
                yield entry.name, f"{entry.name} is not in the old checkpoint"
            else:
                written = found[entry.name].read(entry.name)
                what = "codes and scales" if entry.migration == "carried" else "values"
                problem = f"{entry.name} does not have the {what} of the old checkpoint"
                yield entry.name, None if _is_same(entry, old, written) else problem


def _is_same(entry: TensorEntry, old: OldTensor, written: Any) -> bool:
    if entry.migration == "requantized":
        difference = (dequantize(written).float() - _values(old).float()).abs()
        return (float(difference.max()) if difference.numel() else 0.0) == entry.max_abs_error
    expected: Any = _values(old) if entry.migration == "dequantized" else old.make(False)
    if entry.migration == "carried":
        repair(expected)
    alike = (type(expected), expected.dtype, expected.shape) == (type(written), written.dtype, written.shape)
    return alike and content_sha256(expected) == content_sha256(written)


def _values(old: OldTensor) -> torch.Tensor:
    """What the old tensor stands for."""
    if old.exact is not None:
        return old.exact()
    made = old.make(False)
    return dequantize(made) if hasattr(made, "__tensor_flatten__") else made


def _packed_on(command: str) -> Any:
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    found = words[words.index(_PACKED_ON) + 1 :][:1] if _PACKED_ON in words else []
    return found[0] if found and found[0] in _CPUS else None
