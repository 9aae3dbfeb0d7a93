"""What is to be evaluated, and everything that can be wrong with it before a model is opened."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import Checkpoint, Part
from aoconvert.checkpoint.evaluation import EvalSource, Task
from aoconvert.checkpoint.files import check_files, file_sha256
from aoconvert.checkpoint.manifest import EVAL_NAME, MANIFEST_NAME, Manifest
from aoconvert.checkpoint.opening import openable
from aoconvert.checkpoint.report import some
from aoconvert.environment import choose_devices
from aoconvert.errors import PlanError, SourceError, UsageError
from aoconvert.evaluation.gates import check_gates
from aoconvert.evaluation.tasks import tasks_of
from aoconvert.files import check_replaceable, writing
from aoconvert.humanize import argument
from aoconvert.options.evaluate import EvaluateOptions
from aoconvert.options.fields import record
from aoconvert.progress import Progress
from aoconvert.sources import Source
from aoconvert.verification.library import find_other_model, originals
from aoconvert.verification.load_device import choose_load_device
from aoconvert.verification.original import check_source, other_numbers

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
_SMALL = (".json", ".txt", ".model", ".py", ".jinja")


@dataclass(frozen=True)
class Job:
    """A checkpoint and its original, both looked at.

    Attributes:
        folder, label: of the checkpoint.
        target, manifest, manifest_sha256: what it is.
        source: the original, its files local.
        options: what the user said.
        progress: is told what happens.
        tasks: quantized part → its task.
        originals: quantized part → how the library opens what it was made of.
        device: where both run: as torch names it, or ``cuda:all``.
        described: the original as the report names it.
        writes: whether report and sheet go into the folder.
    """

    folder: Path
    label: str
    target: Checkpoint
    manifest: Manifest
    manifest_sha256: str
    source: Source
    options: EvaluateOptions
    progress: Progress
    tasks: Mapping[str, Task]
    originals: Mapping[str, Mapping[str, Any]]
    device: str
    described: EvalSource
    writes: bool = True

    def part(self, name: str) -> Part:
        """The quantized part of this name."""
        return next(part for part in self.target.parts if part.name == name)

    def source_facts(self) -> dict[str, Any]:
        """Everything about the original that its outputs depend on; weights that were quantized are hashed already."""
        small = (path for path in sorted(self.source.files()) if path.endswith(_SMALL))
        hashes = {path: _sha256_of(self.source, path) for path in small}
        if self.described.same_files:
            return {"small": hashes, "weights": sorted(file.sha256 for file in self.manifest.source.files)}
        weights = (path for path in sorted(self.source.files()) if path.endswith((".safetensors", ".bin")))
        return {"small": hashes, "weights": sorted(_sha256_of(self.source, path) for path in weights)}

    def command(self) -> str:
        """The command that gives the same figures again."""
        words = record(self.options, {"revision": None})
        source = self.source.repo_id or argument(Path(self.source.label).name)
        if self.source.repo_id is not None and self.source.revision is not None:
            words += ["--source-revision", self.source.revision]
        return shlex.join(["aoconvert", "eval", argument(self.folder.resolve().name), "--source", source, *words])


def prepare(
    folder: Path,
    label: str,
    options: EvaluateOptions,
    find_source: Callable[[], Source],
    progress: Progress,
    *,
    writes: bool = True,
) -> Job:
    """Look at a checkpoint and its original; nothing is written, and no model opened.

    Args:
        folder, label: the checkpoint.
        options: what to compare on.
        find_source: resolves the original; it is called once the checkpoint is known to be whole.
        progress: is told what happens.
        writes: whether report and sheet go into the folder.

    Raises:
        SourceError: the checkpoint is unfinished or damaged, or its original is another model.
        VerificationError: its pickles must not be loaded.
        UsageError: an option that does not apply.
        PlanError: it cannot be run here.
    """
    manifest = manifests.load(folder)
    if writes:
        with writing(folder / EVAL_NAME):
            check_replaceable(folder / EVAL_NAME)
    target = openable(folder, trust=options.trust_remote_code)
    tasks = tasks_of(target)
    check_gates(options, list(tasks.values()))
    check_text(options)
    check_inputs(options, pipeline=target.kind != "transformers")
    device = _choose_device(target, options.device)
    progress.start("files", 0)
    problems, _ = check_files(folder, manifest)
    progress.finish()
    if problems:
        raise SourceError(f"{label} is not what its manifest lists: {some(problems)}", hint="run aoconvert verify")
    if manifest.source.loras:
        raise PlanError(["a LoRA was added to the source: there is no original with it to compare with"])
    source = find_source()
    if source.kind == "file":
        raise PlanError([f"{source.label} is a single file: the library opens a folder or a repo"])
    found = originals(target, source, trust=options.trust_remote_code)
    _require_same_model(target, source, manifest, found)
    status, _ = check_source(source, manifest.source)
    described = EvalSource(
        label=source.repo_id or Path(source.label).name,
        repo_id=source.repo_id,
        revision=source.revision,
        same_files={"passed": True, "failed": False, "skipped": None}[status],
    )
    return Job(
        folder, label, target, manifest, file_sha256(folder / MANIFEST_NAME), source, options, progress, tasks, found,
        device, described, writes,
    )  # fmt: skip


def check_text(options: EvaluateOptions) -> None:
    """Refuse a file of text that cannot be read, or that is empty.

    Raises:
        UsageError: there is one.
    """
    for path in options.text:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--text {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--text {path} is not UTF-8 text (byte {error.start})") from error
        if not text.strip():
            raise UsageError(f"--text {path} is empty", hint="give a text of some thousand words")


def check_inputs(options: EvaluateOptions, *, pipeline: bool) -> None:
    """Refuse prompts for a model, and text for a pipeline.

    Raises:
        UsageError: there are some.
    """
    if options.prompts is not None and not pipeline:
        raise UsageError("--prompts is for pipelines, and this is a model", hint="give text with --text")
    if options.text and pipeline:
        raise UsageError("--text is for language models, and this is a pipeline", hint="give prompts with --prompts")


def _choose_device(target: Checkpoint, requested: str) -> str:
    if "," in requested or requested.endswith(":all"):
        choose_devices(requested)
        return f"{requested.partition(':')[0]}:all"
    place = choose_load_device(target, requested)
    if place.obstacle is not None:
        raise PlanError([f"it cannot run on {place.device}: {place.obstacle}"])
    return place.device


def _require_same_model(
    target: Checkpoint, source: Source, manifest: Manifest, found: Mapping[str, Mapping[str, Any]]
) -> None:
    """Whether the original is the same model, by its class, its numbers and its tokenizer.

    Raises:
        SourceError: it is not.
    """
    other = find_other_model(target, source, manifest)
    problems = [other] if other is not None else []
    for part in target.parts:
        if part.name in found:
            own, theirs = target.folder / part.folder, Path(found[part.name]["folder"])
            problems += [*other_numbers(part, theirs), *_other_tokenizers(own, theirs)]
    if problems:
        raise SourceError(some(problems, 2), hint="--source names the model that was quantized")


def _other_tokenizers(own: Path, theirs: Path) -> Iterator[str]:
    for name in _TOKENIZERS:
        if (
            (own / name).is_file()
            and (theirs / name).is_file()
            and file_sha256(own / name) != file_sha256(theirs / name)
        ):
            yield f"the source's {name} has a different SHA-256: the two split text into different tokens"
            return


def _sha256_of(source: Source, path: str) -> str:
    known = source.files()[path]
    if known.sha256 is not None:
        return known.sha256
    try:
        return file_sha256(source.local(path))
    except (OSError, SourceError):  # not fetched: nothing reads it
        return str(known.size)
