"""A LoRA that is named on the command line: ``REPO``, ``FOLDER`` or ``FILE``, with ``@WEIGHT`` behind it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aoconvert.errors import SourceError, UsageError
from aoconvert.formats.digest import FileDigest
from aoconvert.formats.safetensors.header import header_of
from aoconvert.options import HubOptions
from aoconvert.sources import Source, resolve
from aoconvert.sources.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from aoconvert.sources.base import show
from aoconvert.sources.folder import FolderSource

_WEIGHT = re.compile(r"[-+]?\d{1,6}(\.\d{1,12})?(e[-+]?\d{1,3})?", re.IGNORECASE)
_SUFFIXES = (".safetensors", ".bin", ".pt")
_NAMES = (*ADAPTER_WEIGHTS, "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class LoraFile:
    """One LoRA.

    Attributes:
        label: what messages call it.
        repo_id, revision: of a repo, with the commit hash; else ``None``.
        path: its weights file: in the repo, or its name.
        place: that file on this machine.
        weight: the factor that the user gave.
        size, sha256: of the file.
        config: its ``adapter_config.json``, as PEFT writes it; ``None`` without.
        header: the strings in the header of a safetensors file.
    """

    label: str
    repo_id: str | None
    revision: str | None
    path: str
    place: Path = field(repr=False)
    weight: float
    size: int
    sha256: str
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    header: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def reference(self) -> str:
        """As ``--lora`` takes it again: a repo with its commit, a file by its name."""
        where = self.path
        if self.repo_id is not None:
            inside = "" if posixpath.basename(self.path) in _NAMES and "/" not in self.path else f"/{self.path}"
            where = f"{self.repo_id}{inside}@{self.revision}"
        return where if self.weight == 1 else f"{where}@{self.weight:g}"


def read_loras(references: Sequence[str], hub: HubOptions) -> list[LoraFile]:
    """Find LoRAs; what is on the Hub is downloaded.

    Args:
        references: as ``--lora`` takes them.
        hub: how the Hub is asked.

    Raises:
        UsageError: a weight that is not one; the same LoRA twice.
        SourceError: there is no such file, or several that could be meant.
        HubError: the Hub said no.
    """
    found = [_read(reference, replace(hub, revision=None)) for reference in references]
    for at, lora in enumerate(found):
        if lora.sha256 in [other.sha256 for other in found[:at]]:
            raise UsageError(f"--lora {show(lora.label)} is given twice", hint="add up the weights")
    return found


def split_weight(reference: str) -> tuple[str, float]:
    """``REFERENCE[@WEIGHT]`` → both; the weight is 1 by default.

    Raises:
        UsageError: the weight is 0.
    """
    name, at, weight = reference.rpartition("@")
    if not at or not _WEIGHT.fullmatch(weight) or Path(reference).expanduser().exists():
        return reference, 1.0
    if not float(weight):
        raise UsageError(f"--lora {show(reference)}: a weight of 0 changes nothing", hint="omit it")
    return name, float(weight)


def _read(text: str, hub: HubOptions) -> LoraFile:
    reference, weight = split_weight(text)
    place = Path(reference).expanduser()
    if place.is_file():
        source: Source = FolderSource(place.parent)
        path, label = place.name, place.name
    else:
        source, path = _find(reference, hub)
        label = source.label
    folder = posixpath.dirname(path)
    config = f"{folder}/{ADAPTER_CONFIG}" if folder else ADAPTER_CONFIG
    peft = source.has(config) and posixpath.basename(path) in ADAPTER_WEIGHTS
    source.fetch([path, *([config] if peft else [])])
    local = source.local(path)
    settings = source.read_json(config) if peft else None
    if peft and not isinstance(settings, dict):
        raise SourceError(f"{label}: {config} is not a JSON object", hint="download it again")
    return LoraFile(
        label,
        source.repo_id,
        source.revision,
        path,
        local,
        weight,
        local.stat().st_size,
        FileDigest(local).finish(),
        settings,
        header_of(source, path).metadata if path.endswith(".safetensors") else {},
    )


def _find(reference: str, hub: HubOptions) -> tuple[Source, str]:
    """The folder or repo, and the weights file in it; the reference may name that behind the repo."""
    wanted = None
    name, at, revision = reference.partition("@")
    if name.endswith(_SUFFIXES) and name.count("/") > 1 and not name.startswith(("/", ".", "~")):
        user, repo, wanted = name.split("/", 2)
        reference = f"{user}/{repo}{at}{revision}"
    try:
        source = resolve(reference, hub)
    except SourceError as error:
        raise SourceError(f"--lora: {error.message}", hint=error.hint) from error
    if wanted is not None:
        source.require(wanted)
        return source, wanted
    files = [path for path in source.files() if "/" not in path and path.endswith(_SUFFIXES)]
    for known in _NAMES:
        if known in files:
            return source, known
    tensors = [path for path in files if path.endswith(".safetensors")] or files
    if len(tensors) != 1:
        held = ", ".join(tensors[:3]) + (", …" if len(tensors) > 3 else "")
        raise SourceError(
            f"--lora {source.label} holds {f'several weights files: {held}' if tensors else 'no weights file'}",
            hint="name the file: user/repo/name.safetensors, or the path of a file",
        )
    return source, tensors[0]
