"""``aoconvert inspect``: find the components of a checkpoint and read their headers."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.manifest import MANIFEST_NAME, Manifest
from aoconvert.checkpoint.manifest import load as load_manifest
from aoconvert.errors import AoconvertError, SourceError
from aoconvert.inspection.components import component, quantization_config
from aoconvert.inspection.files import read_file
from aoconvert.inspection.next_command import next_command
from aoconvert.inspection.types import Component, FileFacts, Inspection
from aoconvert.models.configs import MODELOPT_FILE, with_modelopt
from aoconvert.options import DEFAULT_HUB, HubOptions
from aoconvert.planning.overwriting import tidy
from aoconvert.sources import WEIGHT_SUFFIXES, Source, find_weights, resolve
from aoconvert.sources.base import is_safe_path
from aoconvert.sources.byte_source import LocalFile
from aoconvert.sources.folder import FolderSource
from aoconvert.sources.remote import RangedFile
from aoconvert.sources.weights import Library

_PIPELINE = "model_index.json"
_CONFIG = "config.json"
# What a training run leaves beside a model.
_NO_WEIGHTS = frozenset(
    {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"}
)


def inspect(reference: str, hub: HubOptions = DEFAULT_HUB) -> Inspection:
    """Say what a checkpoint is; weights are not downloaded, no pickle is run, no torchao is needed.

    Args:
        reference: a folder, one weights file, or a Hub repo.
        hub: how to ask for a Hub repo, see ``sources.resolve``.

    Raises:
        SourceError: nothing there, no weights in it, or a header that cannot be read.
        UsageError: a revision for a folder.
        HubError: the Hub refused or could not be reached.
    """
    source, name = find(reference, hub)
    return inspect_source(reference, source, name)


def find(reference: str, hub: HubOptions = DEFAULT_HUB) -> tuple[Source, str | None]:
    """Where a checkpoint is, and the file where it is only one; see :func:`inspect`."""
    place = _file(reference)
    if place is None:
        return resolve(reference, hub, small_files=False), None
    if not _may_hold_weights(place):
        raise SourceError(
            f"{reference} is not a weights file", hint=f"weights are in {', '.join(sorted(WEIGHT_SUFFIXES))}"
        )
    return FolderSource(place.parent), place.name


def inspect_source(reference: str, source: Source, name: str | None) -> Inspection:
    """Say what a checkpoint is that :func:`find` found."""
    reader = _Reader(source)
    if name is not None:
        part = reader.single(name)
        return Inspection(reference, None, part.library, part.class_name, (part,), 0, next_command(reference, (part,)))
    if source.kind == "folder":
        tidy(source.root)
    library, class_name, parts = reader.everything()
    command = next_command(reference, parts)
    return Inspection(reference, source.revision, library, class_name, tuple(parts), reader.fetched, command)


def _file(reference: str) -> Path | None:
    try:
        place = Path(reference).expanduser()
        return place if reference and place.exists() and not place.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _may_hold_weights(place: Path) -> bool:
    """By its name, or by its first bytes: a blob of the Hub cache has no ending."""
    if place.suffix.lower() in WEIGHT_SUFFIXES:
        return True
    with LocalFile(place) as file:
        head = file.read(0, min(9, file.size))
    return head.startswith((b"PK\x03\x04", b"GGUF")) or head[8:] == b"{"


class _Reader:
    """Reads the configs and headers of one source, and counts what that costs.

    Attributes:
        fetched: bytes of bodies that came over the network.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._manifest: Manifest | None = None
        self.fetched = 0

    def single(self, name: str) -> Component:
        """One weights file; the config beside it says what it belongs to, where there is one."""
        config = self._json(_CONFIG)
        library, class_name = _model(config)
        facts = self._facts(name, quantization_config(config))
        return component("", library, class_name, [facts], config, self._find_manifest(name))

    def everything(self) -> tuple[str | None, str | None, list[Component]]:
        """Library and class of the whole, and its components."""
        index = self._json(_PIPELINE)
        if index:
            parts = [part for name, value in index.items() if (part := self._part(name, value)) is not None]
            if not parts:
                raise SourceError(f"{self._source.label} is a pipeline without weights", hint="the copy is incomplete")
            class_name = index.get("_class_name")
            return "diffusers", class_name if isinstance(class_name, str) else None, parts
        part = self._model("", "", None)
        if part is None:
            raise SourceError(
                f"{self._source.label} holds no weights that aoconvert knows",
                hint="give the folder that has model_index.json or config.json in it, or one weights file",
            )
        return part.library, part.class_name, [part]

    def _part(self, name: str, value: object) -> Component | None:
        """A component of a pipeline, ``[library, class]`` in its index; ``None`` for one without weights."""
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or not is_safe_path(name):
            return None
        return self._model(name, name, value)

    def _model(self, name: str, folder: str, listed: list[Any] | None) -> Component | None:
        config = self._json(posixpath.join(folder, _CONFIG))
        config = {**with_modelopt(config, self._json(posixpath.join(folder, MODELOPT_FILE)))}
        library, class_name = _model(config)
        if listed is not None and isinstance(listed[1], str):
            class_name = listed[1]
            library = listed[0] if listed[0] in ("diffusers", "transformers") else library
        paths, problem = self._weights(folder, library)
        if not paths:
            return None
        facts = [self._facts(path, quantization_config(config)) for path in paths]
        return component(name, library, class_name, facts, config, self._find_manifest(paths[0]), problem)

    def _weights(self, folder: str, library: str | None) -> tuple[list[str], str | None]:
        """The files a loader would take, or all weights of the folder and why no loader takes them."""
        problem: str | None = None
        for known in _libraries(library):
            try:
                found = find_weights(self._source, folder, known)
            except SourceError as error:  # only variants, a shard that is missing: shown all the same
                problem = problem or error.message
                continue
            if found is not None:
                return list(found.files), None
        paths = [
            path
            for path in self._source.files()
            if posixpath.dirname(path) == folder
            and posixpath.splitext(path)[1].lower() in WEIGHT_SUFFIXES
            and posixpath.basename(path) not in _NO_WEIGHTS
        ]
        return paths, problem

    def _facts(self, path: str, config: Mapping[str, Any]) -> FileFacts:
        local, label = self._source.is_local(path), f"{self._source.label}: {path}"
        with self._source.open(path) as file:
            facts = read_file(file, path, label, local=local, config=config)
            if isinstance(file, RangedFile):
                self.fetched += file.fetched
        return facts

    def _json(self, path: str) -> dict[str, Any]:
        """A JSON object of the source, fetched; empty where there is none.

        Raises:
            SourceError: it is there and no JSON object.
        """
        if not self._source.has(path):
            return {}
        self._fetch(path)
        value = self._source.read_json(path)
        if not isinstance(value, dict):
            raise SourceError(f"{self._source.label}: {path} is not a JSON object")
        return value

    def _fetch(self, path: str) -> None:
        if self._source.is_local(path):
            return
        self._source.fetch([path])
        self.fetched += self._source.require(path).size

    def _find_manifest(self, path: str) -> Manifest | None:
        """The manifest, when it lists the file; one that cannot be read says nothing."""
        if self._manifest is None and self._source.has(MANIFEST_NAME):
            self._fetch(MANIFEST_NAME)
            try:
                self._manifest = load_manifest(self._source.root)
            except AoconvertError:
                return None
        if self._manifest is None:
            return None
        written = {file.path for part in self._manifest.components for file in part.files}
        return self._manifest if path in written else None


def _libraries(library: str | None) -> tuple[Library, ...]:
    if library == "diffusers":
        return ("diffusers",)
    return ("transformers",) if library == "transformers" else ("diffusers", "transformers")


def _model(config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Library and class that a ``config.json`` names."""
    class_name = config.get("_class_name")
    if isinstance(class_name, str):
        return "diffusers", class_name
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return "transformers", architectures[0]
    return ("transformers", None) if isinstance(config.get("model_type"), str) else (None, None)
