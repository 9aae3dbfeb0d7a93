"""What a conversion to another format will do, and everything that stands in its way, before anything is written."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packaging.version import Version

from aoconvert.checkpoint.manifest import ComponentEntry, Manifest, UnquantizedEntry
from aoconvert.environment import import_torchao, quiet_imports
from aoconvert.errors import PlanError, SourceError, UsageError, WriteError
from aoconvert.formats.registry import FORMATS, FileFormat, open_stored, written_as
from aoconvert.formats.torch_bin.contents import BinTensor, Instance
from aoconvert.planning.output import output_problems, space_problems
from aoconvert.schemes.imports import imports
from aoconvert.schemes.table import INT4, catalogue
from aoconvert.schemes.tensor_classes import class_named, oldest_reader
from aoconvert.sources.folder import FolderSource
from aoconvert.sources.weights import STEMS

Part = ComponentEntry | UnquantizedEntry


def parts_of(manifest: Manifest) -> list[Part]:
    """Everything in a manifest that has weights."""
    return [*manifest.components, *manifest.unquantized]


@dataclass(frozen=True)
class FilePair:
    """A file that is written anew: its path, the new one, and whether it is an index of others."""

    old: str
    new: str
    is_index: bool


def prepare(
    folder: Path, manifest: Manifest, format_: FileFormat, output: Path, *, overwrite: bool
) -> Mapping[str, FilePair]:
    """The files to write anew, by their path.

    Raises:
        PlanError: with everything that is in the way.
        SourceError, UnsafeFileError: a weights file that is damaged, or must not be loaded.
    """
    import_torchao()
    with quiet_imports():
        for name in imports([name for entry in manifest.components for name in entry.safe_globals]):
            importlib.import_module(name)
    if absent := next((file.path for file in manifest.files() if not (folder / file.path).is_file()), None):
        raise SourceError(f"{folder} has no file {absent}", hint="the manifest lists it: download or make it again")
    pairs: dict[str, FilePair] = {}
    problems: list[str] = []
    for entry in parts_of(manifest):
        for file in entry.files:
            pair = _pair(entry, file.path, format_)
            if pair is not None:
                pairs[file.path] = pair
                problems += [] if pair.is_index else _unstorable(folder, entry, file.path, format_)
    if all(entry.format == format_.name for entry in manifest.components):
        problems.append(f"{folder} is in {format_.name} files already")
    problems += output_problems(FolderSource(folder), output, overwrite=overwrite)
    problems += space_problems(output, sum(file.size for file in manifest.files()))
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    return pairs


def renamed(pairs: Mapping[str, FilePair], path: str) -> str:
    """Where a file's content is afterwards."""
    return pairs[path].new if path in pairs else path


def loads_with(entry: ComponentEntry, format_: FileFormat) -> dict[str, str]:
    """Versions that load the component then: of safetensors by its classes, of a ``.bin`` by its schemes, too."""
    quantized = [tensor for tensor in entry.tensors if tensor.data_names]
    classes = {tensor.class_name for tensor in quantized}
    before = entry.loads_with.get("torchao", "").removeprefix(">=") or "0.13"
    needs = [oldest_reader(format_.name, classes, entry.library)]
    if format_.name == "safetensors":
        needs.append(before)
    else:
        made = {known.name: known.min_torchao for known in (*catalogue(), *INT4.values())}
        needs += [made.get(tensor.scheme or "", before) for tensor in quantized]
        config = json.dumps(entry.config)
        if "PerGroup" in config or "ASYMMETRIC" in config:
            needs += [since for name in classes if (since := class_named(name).groups_since) is not None]
    return {**entry.loads_with, "torchao": f">={max(needs, key=Version)}"}


def _pair(entry: Part, path: str, format_: FileFormat) -> FilePair | None:
    """The new path of a file of weights, or of an index; ``None`` for another file, or one that stays."""
    place = PurePosixPath(path)
    if entry.library == "torch":
        raise PlanError([f"{path} is a file of tensors without a model, which has to stay a .bin"])
    for known in FORMATS.values():
        stem = re.escape(STEMS[entry.library][known.name])
        match = re.fullmatch(rf"{stem}(.*){re.escape(known.suffix)}(\.index\.json)?", place.name)
        if match and known is not format_:
            new = f"{STEMS[entry.library][format_.name]}{match[1]}{format_.suffix}{match[2] or ''}"
            return FilePair(path, str(place.with_name(new)), match[2] is not None)
    if (found := written_as(path)) is not None and found is not format_:
        raise UsageError(f"{path} is not a name that {entry.library} looks for", hint="rename it, with config.json")
    return None


def _unstorable(folder: Path, entry: Part, path: str, format_: FileFormat) -> list[str]:
    """What the format cannot store of a file, one line for each kind of tensor."""
    found: dict[str, str] = {}
    label = f"{entry.name}: " if entry.name else ""
    with open_stored(folder / path) as stored:
        for name, tensor in stored.contents.tensors.items():
            kind = f"{tensor.class_name} {tensor.dtype} {_attributes(tensor)}"
            if kind in found:
                continue
            try:
                format_.writer.outline({name: stored.like(name)})
            except WriteError as error:
                found[kind] = f"{label}{error.message} ({error.hint})"
            else:
                found[kind] = ""
    return list(dict.fromkeys(filter(None, found.values())))


def _attributes(tensor: BinTensor) -> str:
    return str({name: value for name, value in tensor.attributes.items() if isinstance(value, Instance)})
