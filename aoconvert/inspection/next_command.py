"""The command that makes a checkpoint of today out of what was inspected."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from aoconvert.humanize import argument
from aoconvert.inspection.foreign import GGUF_LANGUAGE_MODELS
from aoconvert.inspection.types import Component
from aoconvert.originals.methods import METHODS

_READ = ("bin", "safetensors")


def next_command(path: str, components: Sequence[Component]) -> str | None:
    """What to type next.

    Args:
        path: what was inspected.
        components: what was found.

    Returns:
        ``aoconvert migrate`` for an old checkpoint, ``verify`` for one of today, ``quantize`` for an original; ``None``
        where none of them takes it, or a file must not be loaded.
    """
    if any(part.unsafe for part in components):
        return None
    place = path if not path.startswith(("-", "~")) else argument(path)
    if any(is_old(part) for part in components):
        # which CPU packed int4 no file says: migrate refuses to guess, and names the choices
        return shlex.join(["aoconvert", "migrate", place])
    kinds = {part.kind for part in components if part.kind != "plain"}
    if kinds and kinds <= {"torchao", "torchao-safetensors"}:
        return shlex.join(["aoconvert", "verify", place])
    if kinds == {"gguf"}:
        readable = _is_language_model(path, components)
        return shlex.join(["aoconvert", "quantize", place, "--scheme", "int8wo"]) if readable else None
    known = kinds <= set(METHODS) and all(file.format in _READ for part in components for file in part.files)
    if known and any(part.class_name for part in components):
        beside = ["--config", place.rpartition("/")[0] or "."] if Path(path).is_file() else []
        return shlex.join(["aoconvert", "quantize", place, "--scheme", "int8wo", *beside])
    return None


def _is_language_model(path: str, components: Sequence[Component]) -> bool:
    """Whether a GGUF file on this machine is one that transformers converts."""
    architectures = {file.metadata.get("general.architecture") for part in components for file in part.files}
    return Path(path).is_file() and architectures <= GGUF_LANGUAGE_MODELS


def is_old(part: Component) -> bool:
    """Whether ``migrate`` is for it: torchao of today does not open it, or diffusers drops what does."""
    if part.kind == "quanto":
        return True
    loading = part.loading
    return part.kind == "torchao" and loading is not None and (loading.maximum is not None or not loading.possible)
