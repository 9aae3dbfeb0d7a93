"""``aoconvert.load``: open a checkpoint in this process, by the way that was proven."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import CODE_INSIDE, Checkpoint, from_folder, from_manifest, with_imports
from aoconvert.checkpoint.files import shadows
from aoconvert.checkpoint.load_code import load_code
from aoconvert.checkpoint.manifest import MANIFEST_NAME
from aoconvert.checkpoint.report import Strategy, proven_strategy
from aoconvert.environment import import_diffusers, import_torchao
from aoconvert.errors import VerificationError
from aoconvert.formats.registry import read_stored
from aoconvert.schemes import int4


def open_checkpoint(folder: Path, kwargs: dict[str, Any]) -> Any:
    """See ``aoconvert.load``."""
    target = openable(folder, trust=kwargs.get("trust_remote_code") is True)
    failures = []
    for strategy in _strategies(target):
        try:
            return _open(target, strategy, kwargs)
        except Exception as error:  # whatever the libraries raise; the next way may work
            failures.append(f"{strategy}: {type(error).__name__}: {error}".splitlines()[0])
    raise VerificationError(f"{folder} cannot be opened: {'; '.join(failures)}", hint="aoconvert verify gives details")


def openable(folder: Path, *, trust: bool) -> Checkpoint:
    """A checkpoint that may be opened: its pickles are safe, and no other file would be loaded in place of its own.

    Raises:
        VerificationError: they are not, it is packed for another CPU, or it has code inside and there is no ``trust``.
        SourceError: it is no torchao checkpoint.
    """
    has_manifest = (folder / MANIFEST_NAME).is_file()
    target = from_manifest(folder, manifests.load(folder)) if has_manifest else from_folder(folder)
    names = {use.name for path in target.files for use in read_stored(folder / path).globals}
    if not has_manifest:
        target = with_imports(target, names)
    for entry in target.manifest.components if target.manifest is not None else ():
        if (reason := int4.misfit(entry.layout.packing)) is not None:
            raise VerificationError(f"{folder}: {reason}")
    listed = {file.path for file in target.manifest.files()} if target.manifest is not None else ()
    stale = shadows(folder, {part.folder: part.files for part in target.parts}, listed)
    if stale:
        raise VerificationError(stale[0], hint="remove it, or make the checkpoint again")
    if target.runs_code and not trust:
        raise VerificationError(f"{folder}: {CODE_INSIDE}", hint="read that code; trust_remote_code=True runs it")
    return target


def _strategies(target: Checkpoint) -> tuple[Strategy, ...]:
    """The way that the last verification of this manifest proved, or both in turn."""
    if target.fused:
        return ("assign",)
    return ("assign",) if proven_strategy(target.folder) == "assign" else ("from-pretrained", "assign")


@contextlib.contextmanager
def allow_globals(target: Checkpoint) -> Iterator[None]:
    """Have ``torch.load(weights_only=True)`` accept what a checkpoint's pickles name."""
    import torch

    import_torchao()
    for name in target.imports:
        importlib.import_module(name)
    # torch takes back on exit what it was given on entry, also what was registered before
    known = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals(
        [found for name in target.safe_globals if (found := _object(name)) not in known]
    ):
        yield


def _open(target: Checkpoint, strategy: Strategy, kwargs: dict[str, Any]) -> Any:
    import_diffusers()
    with allow_globals(target):
        if strategy == "from-pretrained":
            return _from_pretrained(target, kwargs)
        names: dict[str, Any] = {}
        exec(
            compile(load_code(target, str(target.folder.resolve()), strategy, device="cpu"), "<load code>", "exec"),
            names,
        )
        return names.get("pipe", names.get("model"))


def _from_pretrained(target: Checkpoint, kwargs: dict[str, Any]) -> Any:
    import torch

    defaults: dict[str, Any] = {}
    for part in target.parts:
        defaults |= part.kwargs
    if "torch_dtype" in defaults:
        defaults["torch_dtype"] = getattr(torch, defaults["torch_dtype"])
    module = importlib.import_module("transformers" if target.kind == "transformers" else "diffusers")
    first = target.parts[0]
    class_name = "DiffusionPipeline" if target.kind == "pipeline" else first.auto_class or first.class_name
    return getattr(module, class_name).from_pretrained(str(target.folder), **{**defaults, **kwargs})


def _object(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
