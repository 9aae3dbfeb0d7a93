"""What is to be measured, and everything that can be wrong with it before a model is opened."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import Checkpoint
from aoconvert.checkpoint.files import check_files, file_sha256
from aoconvert.checkpoint.load_code import card_strategy, load_code
from aoconvert.checkpoint.manifest import BENCH_NAME, MANIFEST_NAME, Manifest
from aoconvert.checkpoint.opening import openable
from aoconvert.checkpoint.report import some
from aoconvert.errors import PlanError, SourceError
from aoconvert.files import check_replaceable, writing
from aoconvert.humanize import argument
from aoconvert.models import ModelLayout, identify
from aoconvert.options.bench import BenchOptions
from aoconvert.options.fields import record
from aoconvert.progress import Progress
from aoconvert.sources import Source
from aoconvert.sources.folder import FolderSource
from aoconvert.verification.library import find_other_model, originals
from aoconvert.verification.load_device import choose_load_device
from aoconvert.verification.original import other_numbers


@dataclass(frozen=True)
class Job:
    """A checkpoint and, where it is to be measured too, its original, both looked at.

    Attributes:
        folder, label: of the checkpoint.
        target, manifest, manifest_sha256: what it is.
        layout: its models.
        source: the original, its files local; ``None``: it is not measured.
        originals: quantized part → how the library opens what it was made of.
        options: what the user said.
        device: where both run, as torch names it.
    """

    folder: Path
    label: str
    target: Checkpoint
    manifest: Manifest
    manifest_sha256: str
    layout: ModelLayout
    source: Source | None
    originals: Mapping[str, Mapping[str, Any]]
    options: BenchOptions
    device: str

    @property
    def measured(self) -> str:
        """Name of the part that is fused, compiled and measured by itself: a pipeline's denoiser."""
        if self.target.kind != "pipeline":
            return ""
        chosen = self.layout.default_components
        return chosen[0].name if chosen else self.target.parts[0].name

    @property
    def measured_class(self) -> str:
        """The class of that part."""
        component = self.layout.component(self.measured)
        return component.class_name if component is not None else self.target.parts[0].class_name

    @property
    def measured_folder(self) -> str:
        """The folder of that part."""
        component = self.layout.component(self.measured)
        return str(self.target.folder.resolve() / (component.folder if component is not None else ""))

    @property
    def scheme(self) -> str:
        """Of the result; several are joined by ``+``."""
        return "+".join(dict.fromkeys(entry.scheme for entry in self.manifest.components))

    @property
    def dtype(self) -> str:
        """Of what is not quantized, and of the original while it is measured."""
        return next((part.dtype for part in self.target.parts if part.dtype is not None), "float32")

    def result_code(self, device: str) -> str:
        """Python that opens the result, as its card does."""
        return load_code(self.target, str(self.target.folder.resolve()), card_strategy(self.target), device=device)

    def source_code(self, device: str) -> str:
        """Python that opens the original in the dtype of the result."""
        assert self.source is not None
        part = self.target.parts[0]
        how = self.originals[part.name]
        options = {"torch_dtype" if part.library == "diffusers" else "dtype": f"torch.{self.dtype}"}
        options |= {"variant": repr(how["variant"])} if how["variant"] is not None else {}
        options |= {"local_files_only": "True"}
        if self.target.kind == "pipeline":
            root = self.source.root / (self.manifest.source.subfolder or "")
            options["torch_dtype"] = f"torch.{self.dtype}"
            options.pop("dtype", None)
            return _code("pipe", "diffusers", "DiffusionPipeline", root, options, device)
        if part.runs_code:
            options["trust_remote_code"] = "True"
        name = how["auto_class"] or how["class_name"]
        return _code("model", how["module"], name, Path(how["folder"]), options, device)

    def command(self) -> str:
        """The command that measures the same again."""
        words = ["aoconvert", "bench", argument(self.folder.resolve().name)]
        if self.source is not None:
            words += ["--source", self.source.repo_id or argument(Path(self.source.label).name)]
            if self.source.repo_id is not None and self.source.revision is not None:
                words += ["--source-revision", self.source.revision]
        words += ["--device", self.device]
        return shlex.join([*words, *record(self.options, {"revision": None})])


def _code(variable: str, module: str, name: str, folder: Path, options: Mapping[str, str], device: str) -> str:
    arguments = "".join(f", {key}={value}" for key, value in options.items())
    return "\n".join(
        [
            "import torch",
            f"from {module} import {name}",
            f"{variable} = {name}.from_pretrained({str(folder.resolve())!r}{arguments})",
            f"{variable}.to({device!r})",
        ]
    )


def prepare(
    folder: Path, label: str, options: BenchOptions, find_source: Callable[[], Source] | None, progress: Progress
) -> Job:
    """Look at a checkpoint and its original; nothing is written, and no model opened.

    Args:
        folder, label: the checkpoint.
        options: what to measure.
        find_source: resolves the original, once the checkpoint is known to be whole; ``None``: it is not measured.
        progress: is told what happens.

    Raises:
        SourceError: the checkpoint is unfinished or damaged, or its original is another model.
        VerificationError: its pickles must not be loaded.
        PlanError: it cannot run here.
        WriteError: something that is not a file is where the report belongs.
    """
    manifest = manifests.load(folder)
    with writing(folder / BENCH_NAME):
        check_replaceable(folder / BENCH_NAME)
    target = openable(folder, trust=options.trust_remote_code)
    progress.start("files", 0)
    problems, _ = check_files(folder, manifest)
    progress.finish()
    if problems:
        raise SourceError(f"{label} is not what its manifest lists: {some(problems)}", hint="run aoconvert verify")
    place = choose_load_device(target, options.device)
    if place.obstacle is not None:
        raise PlanError([f"{label} cannot run on {place.device}: {place.obstacle}"])
    source = find_source() if find_source is not None else None
    found = originals(target, source, trust=options.trust_remote_code)
    if source is not None:
        _require_original(target, source, manifest, found)
    layout = identify(FolderSource(folder))
    sha256 = file_sha256(folder / MANIFEST_NAME)
    return Job(folder, label, target, manifest, sha256, layout, source, found, options, place.device)


def _require_original(
    target: Checkpoint, source: Source, manifest: Manifest, found: Mapping[str, Mapping[str, Any]]
) -> None:
    """Whether the library can open the original, and whether it is the same model.

    Raises:
        PlanError: there is nothing that the library could open as the original.
        SourceError: it is another model.
    """
    if source.kind == "file":
        raise PlanError([f"{source.label} is a single file: bench opens the original as a folder or a repo"])
    if manifest.source.loras:
        raise PlanError(["a LoRA was added to the source: there is no original with it to measure"])
    other = find_other_model(target, source, manifest)
    for part in target.parts if other is None else ():
        other = other or next(other_numbers(part, Path(found[part.name]["folder"])), None)
    if other is not None:
        raise SourceError(other, hint="--source names the model that was quantized")
