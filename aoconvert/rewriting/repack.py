"""``aoconvert repack``: a new checkpoint with the same int4 weights in another packed layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import validate
from aoconvert.checkpoint.manifest import MANIFEST_NAME, ComponentEntry, FileEntry, Manifest, TensorEntry
from aoconvert.engine.manifest_entries import (
    RunClock,
    file_entry,
    layout_entry,
    loading_values,
    run_entry,
    tool_entry,
    written_values,
)
from aoconvert.engine.memory import steady_allocator
from aoconvert.engine.staging import Stage, staged_output
from aoconvert.engine.take_over import take_over
from aoconvert.errors import QuantizeError, SourceError
from aoconvert.formats.base import SealedFile, WrittenTensor
from aoconvert.formats.content import content_sha256
from aoconvert.formats.registry import FORMATS, FileFormat, open_stored
from aoconvert.json_text import parse_json
from aoconvert.planning.types import CopyPlan
from aoconvert.progress import Progress
from aoconvert.rewriting.int4_weights import CannotCarry, carry, digest, pack
from aoconvert.rewriting.repack_plan import PartPlan, prepare
from aoconvert.schemes.tensors import take_apart
from aoconvert.sources.folder import FolderSource


@dataclass(frozen=True)
class Repacked:
    """What was done; ``to_dict`` is what ``aoconvert repack --json`` prints.

    Attributes:
        output: the new folder.
        manifest: what is in it.
        before: the packing that each repacked component had, by its name.
        weights: how many were packed anew.
        unconfirmed: why nobody can be sure of the packed bytes yet; ``None`` where somebody can.
        seconds: it took.
    """

    output: Path
    manifest: Manifest
    before: Mapping[str, str]
    weights: int
    unconfirmed: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Keys are a contract (``cli.md``)."""
        layouts = [
            {"component": entry.name, "before": self.before[entry.name], **entry.layout.model_dump(mode="json")}
            for entry in self.manifest.components
            if entry.name in self.before
        ]
        return {
            "output": str(self.output),
            "manifest": str(self.output / MANIFEST_NAME),
            "layouts": layouts,
            "weights": self.weights,
            "bytes_out": sum(entry.totals.bytes_out for entry in self.manifest.components),
            "unconfirmed": self.unconfirmed,
            "seconds": round(self.seconds, 3),
        }


def repack(folder: Path, device: str, output: Path, *, overwrite: bool, progress: Progress, command: str) -> Repacked:
    """Pack the int4 weights of a checkpoint for another device. The output appears under its name when it is whole.

    Nothing is quantized again: codes, scales and zero points are the same, and are read again from what was written.
    Other tensors are copied byte for byte, other files are copied. An earlier card and verification stay
    behind: they speak of other files.

    Args:
        folder: what ``aoconvert quantize`` wrote.
        device: ``cpu`` (as this machine packs it), ``cuda`` or ``xpu``.
        output: the new folder.
        overwrite: replace an earlier result there.
        progress: is told what happens.
        command: the command line, for the manifest.

    Raises:
        SourceError: no manifest, or files that are not those it lists.
        PlanError: with everything that is in the way.
        QuantizeError: a weight that the layout cannot hold exactly.
        WriteError: disk full, or no permission.
    """
    steady_allocator()
    clock = RunClock()
    old = manifests.load(folder)
    validate(old)
    plans = prepare(folder, old, device, output, overwrite=overwrite)
    with staged_output(output) as stage:
        stage.clear()
        stage.announce([file.path for file in old.files()])
        progress.start("repack", sum(plan.entry.totals.bytes_out for plan in plans.values()))
        entries = [
            _Repacking(folder, plans[entry.name], device, stage, progress).run() if entry.name in plans else entry
            for entry in old.components
        ]
        progress.finish()
        others = [file for entry in old.components if entry.name not in plans for file in entry.files]
        others += [file for part in old.unquantized for file in part.files]
        copy_files(folder, [*others, *old.copied], stage, progress)
        new = old.model_copy(
            update={
                "tool": tool_entry(),
                "components": entries,
                "run": old.run.model_copy(update=dict(run_entry(clock, command))),
            }
        )
        stage.publish(manifests.encode(new))
    return Repacked(
        output,
        new,
        {name: plan.entry.layout.packing for name, plan in plans.items()},
        sum(len(plan.names) for plan in plans.values()),
        next(iter(plans.values())).unconfirmed,
        clock.seconds,
    )


@dataclass
class _Repacking:
    """One component."""

    folder: Path
    plan: PartPlan
    device: str
    stage: Stage
    progress: Progress
    written: dict[str, WrittenTensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def format(self) -> FileFormat:
        """Of its weights files."""
        return FORMATS[self.plan.entry.format]

    def run(self) -> ComponentEntry:
        """Write its files, check them, and say what they are."""
        entry = self.plan.entry
        sealed = {file.path: self._weights(file.path) for file in entry.files if self.format.writes(file.path)}
        tensors = [self._tensor(tensor) for tensor in entry.tensors]
        files = [
            file_entry(file.path, sealed[file.path]) if file.path in sealed else self._other(file, tensors)
            for file in entry.files
        ]
        bytes_out = sum(tensor.bytes_out for tensor in tensors)
        bits = 8 * bytes_out / entry.totals.parameters if entry.totals.parameters else 0.0
        return entry.model_copy(
            update={
                "config": self.plan.config,
                "layout": layout_entry(self.plan.layout, self.plan.unconfirmed),
                "files": files,
                **loading_values(sealed.values()),
                "loads_with": {**entry.loads_with, "torchao": f">={self.plan.min_torchao}"},
                "tensors": tensors,
                "totals": entry.totals.model_copy(update={"bytes_out": bytes_out, "bits_per_weight": bits}),
            }
        )

    def _weights(self, path: str) -> SealedFile:
        """Write one file, and compare what it holds then."""
        entries = {tensor.name: tensor for tensor in self.plan.entry.tensors if tensor.file == path}
        target = self.stage.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_stored(self.folder / path) as stored, self.format.writer(target) as writer:
            if set(stored.order) != set(entries):
                raise SourceError(f"{path}: does not hold the tensors that the manifest lists", hint=_DAMAGED)
            for name in stored.order:
                tensor = stored.read(name)
                if content_sha256(tensor) != entries[name].sha256:
                    raise SourceError(f"{path}: {name} is not what the manifest lists", hint=_DAMAGED)
                self.written[name] = writer.add(name, self._packed(name, tensor))
                self.progress.advance(entries[name].bytes_out, name)
                del tensor
            sealed = writer.seal(list(entries))
        self._check(target, entries)
        return sealed

    def _packed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self.plan.names:
            return tensor
        try:
            parts = carry(take_apart(tensor, self.plan.cpu_layout), self.device)
        except CannotCarry as error:
            raise QuantizeError(f"{name} cannot be repacked for {self.device}: {error}", hint=_AGAIN) from None
        self.digests[name] = digest(parts)
        return pack(parts, self.device, self.plan.algorithm)

    def _check(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        """What was written has the codes, scales and zero points that were read, and the rest its bytes."""
        with open_stored(path) as stored:
            for name in entries:
                tensor = stored.read(name)
                same = content_sha256(tensor) == self.written[name].sha256
                if name in self.digests:
                    same = same and digest(take_apart(tensor)) == self.digests[name]
                if not same:
                    raise QuantizeError(f"{name} changed during repacking", hint="please report this")

    def _tensor(self, tensor: TensorEntry) -> TensorEntry:
        written = self.written.get(tensor.name)  # none for one that is tied
        return replace(tensor, **written_values(written)) if written is not None else tensor

    def _other(self, file: FileEntry, tensors: list[TensorEntry]) -> FileEntry:
        """Write a file that holds no weights: their index, or ``config.json`` with the other layout's config."""
        if file.path.endswith(".index.json"):
            where = {tensor.name: Path(tensor.file).name for tensor in tensors if tensor.file is not None}
            return self.stage.write_index(file.path, where, sum(tensor.bytes_out for tensor in tensors))
        content = FolderSource(self.folder).read_bytes(file.path)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise SourceError(f"{file.path} is not what the manifest lists", hint=_DAMAGED)
        values = parse_json(content)
        values["quantization_config"]["quant_type"] = {"default": self.plan.config}
        return self.stage.write_text(file.path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


_DAMAGED = "quantize again; aoconvert verify shows what else changed"
_AGAIN = "quantize again with --layout-device"


def copy_files(folder: Path, files: list[FileEntry], stage: Stage, progress: Progress) -> None:
    """Copy files that stay as they are, and see that they are what the manifest lists."""
    if not files:
        return
    progress.start("copy", sum(file.size for file in files))
    plans = [CopyPlan(file.path, file.path, file.size) for file in files]
    for file, found in zip(files, take_over(stage, FolderSource(folder), plans, progress), strict=True):
        if found.sha256 != file.sha256:
            raise SourceError(f"{file.path} is not what the manifest lists", hint=_DAMAGED)
    progress.finish()
