"""``aoconvert migrate``: an old checkpoint → one of today's classes, with the same codes and scales."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.manifest import (
    MANIFEST_NAME,
    ComponentEntry,
    DeviationEntry,
    Manifest,
    MigratedEntry,
    TensorEntry,
)
from aoconvert.engine.convert import Making, run
from aoconvert.engine.results import ComponentResult, Seconds, TensorResult
from aoconvert.engine.resume import Journal
from aoconvert.errors import SourceError
from aoconvert.formats.base import SealedFile
from aoconvert.humanize import argument
from aoconvert.models import ModelPart
from aoconvert.options.migrate import MigrateOptions
from aoconvert.planning.types import ComponentPlan
from aoconvert.progress import Progress
from aoconvert.rewriting.migrate_file import migrate_file
from aoconvert.rewriting.migrate_plan import MigrationPlan, Moved, Open, plan_migration, weights_of_all
from aoconvert.rewriting.migrate_types import OldWeights
from aoconvert.rewriting.migrate_write import describe_weights, find_deviation, make_tensor
from aoconvert.rewriting.old_torchao.weights import TorchaoWeights, holds_torchao
from aoconvert.rewriting.quanto.weights import QuantoWeights, holds_quanto
from aoconvert.sources import Source
from aoconvert.sources.weights import WeightFiles

_TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Migrated:
    """What was done; ``to_dict`` is what ``aoconvert migrate --json`` prints."""

    output: Path
    manifest: Manifest
    warnings: tuple[str, ...]
    seconds: float

    @property
    def entries(self) -> list[tuple[ComponentEntry, MigratedEntry]]:
        """The components that were migrated."""
        return [(part, part.migrated) for part in self.manifest.components if part.migrated is not None]

    @property
    def kind(self) -> str:
        """Who wrote the old checkpoint."""
        return "+".join(dict.fromkeys(entry.kind for _, entry in self.entries))

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by what became of them."""
        found = Counter(tensor.migration for part, _ in self.entries for tensor in part.tensors)
        return {
            "carried": found["carried"],
            "dequantized": found["dequantized"],
            "requantized": found["requantized"],
            "unchanged": found[None],
        }

    @property
    def deviations(self) -> list[DeviationEntry]:
        """Tensors that are not what they were, or with which something else is computed."""
        named = len(self.entries) > 1
        return [
            item.model_copy(update={"name": f"{part.name}.{item.name}"}) if named else item
            for part, entry in self.entries
            for item in entry.deviations
        ]

    def to_dict(self) -> dict[str, Any]:
        """Keys are a contract (``cli.md``)."""
        return {
            "output": str(self.output),
            "manifest": str(self.output / MANIFEST_NAME),
            "kind": self.kind,
            "tensors": self.counts,
            "deviations": [item.model_dump() for item in self.deviations],
            "schemes": list(dict.fromkeys(part.scheme for part, _ in self.entries)),
            "bytes_out": sum(part.totals.bytes_out for part, _ in self.entries),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


def migrate(
    source: Source,
    options: MigrateOptions,
    progress: Progress,
    *,
    command: str,
    fetch: Callable[[Sequence[str]], None] = lambda paths: None,
) -> Migrated:
    """Write an old checkpoint again in the tensor classes of today. The output appears when it is whole.

    What one of today's classes can hold keeps its codes and scales, bit for bit. The rest is dequantized exactly, and
    quantized again only where the options name a scheme. Other parts of a pipeline stay as they are.

    Args:
        source: the old checkpoint.
        options: what the user asked for.
        progress: is told what happens.
        command: the command line, for the manifest.
        fetch: makes files of the source local.

    Raises:
        PlanError: with everything that is in the way.
        SourceError, UnsafeFileError: it cannot be read, or must not be loaded.
        ReadError, WriteError: a disk error, a full disk, no permission.
    """
    began = time.perf_counter()
    if (path := single_file(source)) is not None:
        fetch([path])
        with closing(TorchaoWeights(source, [path], options.packed_on)) as weights:
            manifest = migrate_file(source, path, weights, options, progress, command=command)
            return Migrated(options.output, manifest, tuple(weights.warnings), time.perf_counter() - began)
    fetch(weights_of_all(source))
    planned = plan_migration(source, options, KINDS)
    try:
        fetch([file.source for file in planned.plan.copied])
        work = _Migration(planned)
        done = run(
            planned.plan,
            progress,
            command=command,
            resume=options.resume,
            making=Making("migrate", work.write, work.describe),
        )
    finally:
        planned.close()
    return Migrated(done.output, done.manifest, done.warnings, time.perf_counter() - began)


def single_file(source: Source) -> str | None:
    """The torch file of a source that is one, or a folder without a config; ``None`` for any other source.

    Raises:
        SourceError: the source is a file of another format.
    """
    if (file := source.weights_file) is not None:
        if file.lower().endswith(".gguf"):
            raise SourceError(
                f"{file} is a GGUF file, which torchao and Quanto do not write",
                hint=f"aoconvert quantize {argument(str(source.root / file))} --scheme …",
            )
        if not file.lower().endswith(_TORCH_FILES):
            raise SourceError(
                f"{file} is one safetensors file, of which nothing says how it is quantized",
                hint="give the folder that holds it and its config.json",
            )
        return file
    files = [path for path in source.files() if path.endswith(_TORCH_FILES) and "/" not in path]
    configs = [path for path in source.files() if path in ("config.json", "model_index.json")]
    return files[0] if len(files) == 1 and not configs else None


def _open_torchao(
    source: Source, component: ModelPart, files: WeightFiles, options: MigrateOptions
) -> OldWeights | None:
    if files.format != "bin" or not holds_torchao(source, files.files):
        return None
    return TorchaoWeights(source, files.files, options.packed_on)


def _open_quanto(
    source: Source, component: ModelPart, files: WeightFiles, options: MigrateOptions
) -> OldWeights | None:
    if files.format != "safetensors" or not holds_quanto(source, files.files):
        return None
    return QuantoWeights(source, component, files.files, options.exact)


KINDS: tuple[Open, ...] = (_open_torchao, _open_quanto)
"""What opens the weights of each kind of input."""


class _Migration:
    """Makes and writes the tensors of the components.

    Args:
        planned: what to do.
    """

    def __init__(self, planned: MigrationPlan) -> None:
        self._planned = planned
        self._deviations: dict[str, list[DeviationEntry]] = {}

    def write(
        self, component: ComponentPlan, journal: Journal, progress: Progress
    ) -> tuple[ComponentResult, Mapping[str, str]]:
        """Write a component's files; tensors are made one at a time."""
        name, began = component.component.name, time.perf_counter()
        weights, moved = self._planned.weights[name], self._planned.moved[name]
        weights.hash(journal.digests)
        tensors, files = journal.finished(component), journal.sealed(component)
        for file in component.files:
            if file.path not in files:
                files[file.path] = self._write_file(component, file.path, journal, progress, tensors)
        results = {tensor: tensors[tensor] for tensor in component.order if tensor in moved and tensor in tensors}
        found = (find_deviation(moved[key], one.max_abs_error, one.repaired) for key, one in results.items())
        self._deviations[name] = [item for item in found if item is not None]
        tensors |= {tensor.name: tensors[tensor.same_as] for tensor in component.tensors if tensor.same_as is not None}
        seconds = Seconds(writer=time.perf_counter() - began)
        return ComponentResult(tensors, files, seconds), weights.digests()

    def _write_file(
        self,
        component: ComponentPlan,
        path: str,
        journal: Journal,
        progress: Progress,
        tensors: dict[str, TensorResult],
    ) -> SealedFile:
        """Write what a file lacks; where that fails, it stays as it is for a later run."""
        name = component.component.name
        planned = {tensor.name: tensor for tensor in component.tensors if tensor.file == path}
        writer = journal.writer(component.format, path)
        try:
            for key in component.order:
                if key not in planned or not planned[key].is_written or key in tensors:
                    continue
                made, error, repaired = make_tensor(self._planned.old[name][key], self._planned.moved[name].get(key))
                result = TensorResult(writer.add(key, made), None, error, repaired)
                del made
                journal.done(path, result, writer.last(), self._planned.weights[name].marks())
                tensors[key] = result
                progress.advance(planned[key].bytes_in, key)
            also = {key: tensor.same_as for key, tensor in planned.items() if tensor.same_as is not None}
            sealed = writer.seal(list(planned), also)
        except BaseException:
            writer.leave()
            raise
        journal.done_file(path, sealed)
        return sealed

    def describe(self, component: ComponentPlan, entry: ComponentEntry) -> ComponentEntry:
        """Say in the manifest where the tensors are from, and what became of each."""
        name = component.component.name
        weights, moved = self._planned.weights[name], self._planned.moved[name]
        migrated = describe_weights(weights, self._deviations.get(name, []))
        tensors = [_with_migration(tensor, moved.get(tensor.name)) for tensor in entry.tensors]
        unconfirmed = next((item.old.unconfirmed for item in moved.values() if item.old.unconfirmed), None)
        layout = entry.layout.model_copy(update={"unconfirmed": unconfirmed or entry.layout.unconfirmed})
        return entry.model_copy(update={"migrated": migrated, "tensors": tensors, "layout": layout})


def _with_migration(entry: TensorEntry, moved: Moved | None) -> TensorEntry:
    return entry if moved is None else replace(entry, migration=moved.migration)
