"""What the checkpoint holds, under the model's own names; from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.models import Skeleton

if TYPE_CHECKING:
    import torch

    from aoconvert.sources import Source
    from aoconvert.sources.weights import WeightFiles


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint: the file that holds it (relative to the source), its name there, what it is."""

    file: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Inventory:
    """The checkpoint's tensors for one model.

    Attributes:
        direct: state-dict key → the tensor that becomes it as it is.
        merged: state-dict keys that transformers builds from several tensors.
        unused: names that the model has no place for.
        order: state-dict keys as they lie in the files.
    """

    direct: Mapping[str, SourceTensor]
    merged: frozenset[str]
    unused: tuple[str, ...]
    order: tuple[str, ...]


def _headers(source: Source, weights: WeightFiles) -> dict[str, SourceTensor] | None:
    """Checkpoint name → tensor, over all files; ``None`` where the headers cannot be had without the weights."""
    found: dict[str, SourceTensor] = {}
    for path in weights.files:
        if weights.format == "safetensors":
            entries = _safetensors(source, path)
        elif source.is_local(path):
            entries = _torch_bin(source, path)
        else:
            return None
        for entry in entries:
            if weights.index is not None and weights.index.get(entry.name, path) != path:
                continue
            if entry.name in found:
                raise SourceError(
                    f"{source.label}: tensor {entry.name!r} is in {found[entry.name].file} and in {path}",
                    hint="remove the file that does not belong to this checkpoint",
                )
            found[entry.name] = entry
    if weights.index is not None:
        for name, path in weights.index.items():
            if name not in found:
                raise SourceError(
                    f"{source.label}: the index says {name!r} is in {path}, but it is not",
                    hint="download the checkpoint again",
                )
    return found


def _safetensors(source: Source, path: str) -> list[SourceTensor]:
    from aoconvert.readers.safetensors import DTYPES, read_header

    if source.is_local(path):
        return [
            SourceTensor(path, info.name, info.dtype, info.shape, info.nbytes)
            for info in read_header(source.local(path)).values()
        ]
    header: Mapping[str, Any] = source.safetensors_header(path)
    found = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise SourceError(f"{source.label}: {path}: tensor {name!r} has the unknown dtype {entry['dtype']}")
        found.append(SourceTensor(path, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), end - begin))
    return found


def _torch_bin(source: Source, path: str) -> list[SourceTensor]:
    from aoconvert.readers.torch_bin import TorchBinReader

    reader = TorchBinReader(source.local(path))
    try:
        return [SourceTensor(path, i.name, i.dtype, i.shape, i.nbytes) for i in reader.infos().values()]
    finally:
        reader.close()


def take(source: Source, skeleton: Skeleton, weights: WeightFiles | None) -> Inventory | None:
    """Match the checkpoint's tensors with the model's.

    Returns:
        ``None`` where there are no weights to look at (a config alone, or a ``.bin`` on the Hub).

    Raises:
        SourceError: a file is damaged, or two files contradict each other.
    """
    found = _headers(source, weights) if weights is not None else None
    if found is None or weights is None:
        return None
    if skeleton.component.library == "diffusers":
        from aoconvert.models import diffusers

        names: Mapping[str, str] = diffusers.source_names(skeleton, found, sharded=weights.index is not None)
        merged: frozenset[str] = frozenset()
    else:
        from aoconvert.models import transformers

        resolved = transformers.source_names(skeleton, found)
        names, merged = resolved.direct, resolved.merged
    wanted = {spec.name for spec in skeleton}
    direct = {name: found[origin] for name, origin in names.items() if name in wanted}
    position = {name: rank for rank, name in enumerate(found)}
    order = sorted(direct, key=lambda name: position[direct[name].name])
    if merged:  # built after the rest: transformers' loader writes them to files of their own
        unused: tuple[str, ...] = ()
    else:
        used = {tensor.name for tensor in direct.values()}
        unused = tuple(name for name in found if name not in used)
    return Inventory(direct, merged, unused, (*order, *sorted(merged)))
