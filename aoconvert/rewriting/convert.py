"""``aoconvert convert``: a new checkpoint with the same tensors in the other format of weights files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import validate
from aoconvert.checkpoint.manifest import (
    MANIFEST_NAME,
    ComponentEntry,
    FileEntry,
    Manifest,
    StoredEntry,
    TensorEntry,
    UnquantizedEntry,
)
from aoconvert.engine.manifest_entries import RunClock, file_entry, loading_values, run_entry, tool_entry
from aoconvert.engine.memory import steady_allocator
from aoconvert.engine.staging import Stage, staged_output
from aoconvert.errors import QuantizeError, SourceError, WriteError
from aoconvert.files import is_there
from aoconvert.formats.base import FileOutline, SealedFile, StoredFile
from aoconvert.formats.content import content_sha256
from aoconvert.formats.registry import FORMATS, FileFormat, open_stored
from aoconvert.json_text import INDEX_BYTES
from aoconvert.progress import Progress
from aoconvert.rewriting.convert_plan import FilePair, Part, loads_with, parts_of, prepare, renamed
from aoconvert.rewriting.repack import copy_files
from aoconvert.rewriting.taken_over import describe_checkpoint
from aoconvert.sources.folder import FolderSource

_DAMAGED = "quantize again; aoconvert verify shows what else changed"


@dataclass(frozen=True)
class Converted:
    """What was done; ``to_dict`` is what ``aoconvert convert --json`` prints.

    Attributes:
        output: the new folder.
        manifest: what is in it.
        format: of its weights files.
        files: how many of them were written.
        tensors: how many tensors are in these.
        seconds: it took.
    """

    output: Path
    manifest: Manifest
    format: str
    files: int
    tensors: int
    seconds: float

    @property
    def bytes_out(self) -> int:
        """Bytes of the weights files."""
        writes = FORMATS[self.format].writes
        return sum(file.size for entry in parts_of(self.manifest) for file in entry.files if writes(file.path))

    def to_dict(self) -> dict[str, Any]:
        """Keys are a contract (``cli.md``)."""
        return {
            "output": str(self.output),
            "manifest": str(self.output / MANIFEST_NAME),
            "format": self.format,
            "files": self.files,
            "tensors": self.tensors,
            "bytes_out": self.bytes_out,
            "seconds": round(self.seconds, 3),
        }


def convert(
    folder: Path, format_name: str, output: Path, *, overwrite: bool, progress: Progress, command: str
) -> Converted:
    """Write the tensors of a checkpoint into files of the other format. The output appears when it is whole.

    One tensor is in memory at a time. Each is compared with the manifest, where there is one, before it is written, and
    read again afterwards. An earlier card and verification stay behind: they speak of other files.

    Args:
        folder: what ``aoconvert quantize``, ``repack``, ``migrate`` or ``convert`` wrote, or transformers, diffusers or
            torchao's own functions.
        format_name: ``bin`` or ``safetensors``.
        output: the new folder.
        overwrite: replace an earlier result there.
        progress: is told what happens.
        command: the command line, for the manifest.

    Raises:
        SourceError: files that are not those a manifest lists; without one, no torchao tensors, or no torchao config.
        PlanError: with everything that is in the way.
        WriteError: disk full, or no permission.
    """
    steady_allocator()
    clock = RunClock()
    old = manifests.load(folder) if is_there(folder / MANIFEST_NAME) else describe_checkpoint(folder, command)
    validate(old)
    format_ = FORMATS[format_name]
    pairs = prepare(folder, old, format_, output, overwrite=overwrite)
    with staged_output(output) as stage:
        stage.clear()
        stage.announce([renamed(pairs, file.path) for file in old.files()])
        progress.start("convert", sum(file.size for file in old.files() if file.path in pairs))
        parts = [_Conversion(folder, entry, format_, pairs, stage, progress).run() for entry in parts_of(old)]
        progress.finish()
        _copy_others(folder, old, pairs, stage, progress)
        made = old.model_copy(
            update={
                "tool": tool_entry(),
                "components": [part for part in parts if isinstance(part, ComponentEntry)],
                "unquantized": [part for part in parts if isinstance(part, UnquantizedEntry)],
                "run": old.run.model_copy(update=dict(run_entry(clock, command))),
            }
        )
        stage.publish(manifests.encode(made))
    tensors = sum(len(entry.tensors) for entry in parts_of(old))
    files = sum(not pair.is_index for pair in pairs.values())
    return Converted(output, made, format_name, files, tensors, clock.seconds)


def _copy_others(folder: Path, old: Manifest, pairs: Mapping[str, FilePair], stage: Stage, progress: Progress) -> None:
    """Copy what holds no weights that were converted; an index was written anew."""
    files = [file for entry in parts_of(old) for file in entry.files]
    copy_files(folder, [file for file in (*files, *old.copied) if file.path not in pairs], stage, progress)


@dataclass
class _Conversion:
    """A component, or a part that is not quantized."""

    folder: Path
    entry: Part
    format: FileFormat
    pairs: Mapping[str, FilePair]
    stage: Stage
    progress: Progress
    sealed: dict[str, SealedFile] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def run(self) -> Part:
        """Write its files, and say what they are."""
        entry = self.entry
        mine = [self.pairs[file.path] for file in entry.files if file.path in self.pairs]
        with ExitStack() as stack:
            opened = {
                pair.old: stack.enter_context(open_stored(self.folder / pair.old)) for pair in mine if not pair.is_index
            }
            model = _on_meta(entry, opened)
            self.nbytes = sum(t.nbytes for stored in opened.values() for t in stored.contents.tensors.values())
            for path, stored in opened.items():
                self.sealed[path] = self._write(path, stored, model)
        values: dict[str, Any] = {
            "tensors": [
                replace(tensor, file=renamed(self.pairs, tensor.file), sha256=self._digest(tensor))
                if tensor.file is not None
                else tensor
                for tensor in entry.tensors
            ]
        }
        values["files"] = [self._file(file, values["tensors"]) for file in entry.files]
        if isinstance(entry, ComponentEntry):
            values |= {
                "format": self.format.name,
                **loading_values(self.sealed.values()),
                "load": entry.load.model_copy(update={"kwargs": self._kwargs(entry)}),
                "loads_with": loads_with(entry, self.format),
            }
        return entry.model_copy(update=values)

    def _write(self, path: str, stored: StoredFile, model: Mapping[str, torch.Tensor]) -> SealedFile:
        """Write one file, and compare what it holds then."""
        entries = {tensor.name: tensor for tensor in self.entry.tensors if tensor.file == path}
        target = self.stage.root / self.pairs[path].new
        target.parent.mkdir(parents=True, exist_ok=True)
        order, also = stored.order, stored.second_names
        if {*order, *also} != set(entries):
            raise SourceError(f"{path}: does not hold the tensors that the manifest lists", hint=_DAMAGED)
        outline = self._outline(order, list(entries), also, stored, model)
        with self.format.writer(target, head=outline.head) as writer:
            for name in order:
                tensor = stored.read(name)
                self.digests[name] = content_sha256(tensor)
                if entries[name].sha256 and self.digests[name] != entries[name].sha256:
                    raise SourceError(f"{path}: {name} is not what the manifest lists", hint=_DAMAGED)
                writer.add(name, tensor)
                self.progress.advance(stored.contents.tensors[name].nbytes, name)
                del tensor
            sealed = writer.seal(list(entries), also)
        self.digests |= {name: self.digests[same] for name, same in also.items()}
        with open_stored(target) as made:
            for name in order:
                if content_sha256(made.read(name)) != self.digests[name]:
                    raise QuantizeError(f"{name} changed while it was converted", hint="please report this")
        return sealed

    def _outline(
        self,
        order: Sequence[str],
        listed: Sequence[str],
        also: Mapping[str, str],
        stored: StoredFile,
        model: Mapping[str, torch.Tensor],
    ) -> FileOutline:
        try:
            return self.format.writer.outline({name: stored.like(name) for name in order}, listed, also, model)
        except WriteError as error:  # ``prepare`` says what can be seen in headers
            raise SourceError(error.message, hint=error.hint) from error

    def _file(self, file: FileEntry, tensors: Sequence[Any]) -> FileEntry:
        pair = self.pairs.get(file.path)
        if pair is None:
            return file
        if not pair.is_index:
            return file_entry(pair.new, self.sealed[pair.old])
        where = {tensor.name: Path(tensor.file).name for tensor in tensors if tensor.file is not None}
        return self.stage.write_index(pair.new, where, self._total_size(pair.old))

    def _total_size(self, index: str) -> int:
        """What an index says; some writers leave it out."""
        metadata = FolderSource(self.folder).read_json(index, INDEX_BYTES).get("metadata")
        found = metadata.get("total_size") if isinstance(metadata, dict) else None
        return found if isinstance(found, int) else self.nbytes

    def _digest(self, tensor: TensorEntry | StoredEntry) -> str:
        """What was read of a tensor; of one whose file stays as it is what the manifest says, or is read now."""
        if (known := self.digests.get(tensor.name) or tensor.sha256) or tensor.file is None:
            return known or ""
        with open_stored(self.folder / tensor.file) as stored:
            self.digests |= {name: content_sha256(stored.read(name)) for name in stored.contents.tensors}
        return self.digests[tensor.name]

    def _kwargs(self, entry: ComponentEntry) -> dict[str, Any]:
        """diffusers finds a sharded .bin only when it is told."""
        kwargs = {key: value for key, value in entry.load.kwargs.items() if key != "use_safetensors"}
        if entry.library == "diffusers" and self.format.name == "bin" and len(self.sealed) > 1:
            kwargs["use_safetensors"] = False
        return kwargs


def _on_meta(entry: Part, opened: Mapping[str, StoredFile]) -> dict[str, torch.Tensor]:
    """The tensors of all files, in the order of the manifest, as far as the library's reader takes their names."""

    def likes() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in entry.tensors:
            stored = opened.get(tensor.file or "")
            if stored is None or tensor.name not in stored.contents.tensors or tensor.name in stored.second_names:
                continue
            if entry.library != "transformers" or "." in tensor.name:
                yield tensor.name, stored.like(tensor.name)

    return dict(likes())
