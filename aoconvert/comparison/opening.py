"""One side of a comparison: where its weights are, part by part, and the tensors that their headers describe."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.manifest import ComponentEntry, Manifest
from aoconvert.comparison.tensors import StoredTensor, read_tensors
from aoconvert.errors import AoconvertError, SourceError, UnsafeFileError
from aoconvert.inspection.inspect import find, inspect_source
from aoconvert.inspection.types import Component
from aoconvert.options import HubOptions
from aoconvert.progress import Progress
from aoconvert.schemes import int4
from aoconvert.sources import Source
from aoconvert.sources.download import download

_READ = ("bin", "safetensors")


@dataclass(frozen=True)
class SidePart:
    """One model of a side.

    Attributes:
        class_name: of the model; ``None`` where no config says it.
        tensors: by name.
        entry: what a manifest says of it.
        dropped: names beside these that a source has and its checkpoint does not.
    """

    class_name: str | None
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    entry: ComponentEntry | None = field(default=None, repr=False)
    dropped: tuple[str, ...] = ()

    @property
    def packing(self) -> str | None:
        """The CPU's layout of its int4 weights, where a manifest says it."""
        return int4.cpu_layout(self.entry.layout.packing) if self.entry is not None else None


@dataclass(frozen=True)
class Side:
    """A checkpoint or a source.

    Attributes:
        label: as it was asked for.
        source: that holds it.
        parts: its models by name, ``""`` for one by itself.
        is_file: it is one weights file.
        manifest: of a checkpoint by aoconvert.
    """

    label: str
    source: Source
    parts: Mapping[str, SidePart]
    is_file: bool = False
    manifest: Manifest | None = field(default=None, repr=False)

    @property
    def single(self) -> SidePart | None:
        """Its only model, where it is no pipeline."""
        return self.parts.get("")


def open_side(reference: str, hub: HubOptions, progress: Progress) -> Side:
    """Find a checkpoint and read its headers; a repo's weights are fetched into the Hub cache.

    Args:
        reference: a folder, one weights file, or a Hub repo.
        hub: how to ask for a Hub repo.
        progress: is told of the download.

    Raises:
        SourceError: nothing there, or files that cannot be compared.
        UnsafeFileError: a pickle that must not be loaded.
        HubError: the Hub refused or could not be reached.
    """
    source, name = find(reference, hub)
    found = inspect_source(reference, source, name)
    for reason in found.unsafe:
        raise UnsafeFileError(reason, hint="do not use this checkpoint")
    for part in found.components:
        _refuse_other_formats(reference, part)
    files = [file.path for part in found.components for file in part.files]
    download(source, [path for path in files if not source.is_local(path)], progress)
    manifest = _find_manifest(source)
    entries = {entry.name: entry for entry in manifest.components} if manifest is not None else {}
    parts = {}
    for part in found.components:
        # a component that was written without its pipeline has the name that it had there
        entry = entries.get(part.name) or (next(iter(entries.values())) if entries and not part.name else None)
        listed = entry if entry is not None and _lists(entry, part) else None
        parts[part.name] = SidePart(part.class_name, _tensors(source, part), listed)
    return Side(reference, source, parts, name is not None, manifest)


def _lists(entry: ComponentEntry, part: Component) -> bool:
    """Whether a manifest speaks of the files of a part."""
    return {file.path for file in part.files} <= {file.path for file in entry.files}


def _refuse_other_formats(reference: str, part: Component) -> None:
    for file in part.files:
        if file.format not in _READ:
            raise SourceError(
                f"{reference}: {file.path} is a {file.format.upper()} file, which diff does not read",
                hint="diff compares .safetensors and torch files (.bin, .pt)",
            )


def _tensors(source: Source, part: Component) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in part.files:
        label = f"{source.label}: {file.path}"
        for name, tensor in read_tensors(source.local(file.path), label).items():
            if name in found:
                raise SourceError(
                    f"{label}: tensor {name!r} is in another of the checkpoint's files, too",
                    hint="remove the file that does not belong to the checkpoint",
                )
            found[name] = tensor
    return found


def _find_manifest(source: Source) -> Manifest | None:
    """The manifest beside the weights; one that cannot be read says nothing."""
    if source.is_local(manifests.MANIFEST_NAME):
        with suppress(AoconvertError):
            return manifests.load(source.root)
    return None
