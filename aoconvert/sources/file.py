"""A source that is one weights file on this machine, with a config that comes from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from aoconvert.errors import CHECK_PERMISSIONS, SourceError
from aoconvert.json_text import CONFIG_BYTES
from aoconvert.sources.base import FetchProgress, Source, SourceFile
from aoconvert.sources.folder import is_pointer

CONFIG = "config.json"


@dataclass(frozen=True)
class ConfigOrigin:
    """Where the config of a single file comes from.

    Attributes:
        label: what messages call it: the repo id, or the folder's base name.
        repo_id, revision: of a repo, with the commit hash; ``None`` for a folder.
        folder: in the repo or folder.
        inferred: nobody named it: diffusers takes it for this layout.
    """

    label: str
    repo_id: str | None = None
    revision: str | None = None
    folder: str = ""
    inferred: bool = False


class FileSource(Source):
    """One weights file.

    Args:
        place: the file.
        config: of the model that it holds; ``None``: not known yet, and nothing can be made of it.
        origin: where that comes from.
        folder: under which it is in the source.
        note: what the user should know of it.
        made: a folder with files that a library made of what the file holds beside the weights: a tokenizer.
    """

    kind: Literal["hub", "folder", "file"] = "file"
    repo_id = None
    revision = None

    def __init__(
        self,
        place: Path,
        config: Mapping[str, Any] | None = None,
        origin: ConfigOrigin | None = None,
        folder: str = "",
        note: str | None = None,
        made: TemporaryDirectory[str] | None = None,
    ) -> None:
        self.place = place.absolute()
        self.root = self.place.parent
        self.label = self.weights_file = self.place.name
        self.origin, self.note = origin, note
        self.config = config
        self._at = f"{folder}/{CONFIG}" if folder else CONFIG
        try:
            self._files = {self.label: SourceFile(self.label, self.place.stat().st_size)}
        except OSError as error:
            raise SourceError(f"{self.label} cannot be read: {error.strerror}", hint=CHECK_PERMISSIONS) from error
        self._made = made  # as long as the source is
        self._beside = {path.name: path for path in sorted(Path(made.name).iterdir())} if made is not None else {}
        for name, path in self._beside.items():
            self._files[name] = SourceFile(name, path.stat().st_size)
        if config is not None:
            self._files[self._at] = SourceFile(self._at, 0)

    def __repr__(self) -> str:
        return f"FileSource({self.label!r})"

    def files(self) -> Mapping[str, SourceFile]:
        """The file, and its config."""
        return self._files

    def is_local(self, path: str) -> bool:
        """Whether it is there; see :meth:`Source.is_local`."""
        return path == self.label or path in self._beside

    def local(self, path: str) -> Path:
        """The file itself; see :meth:`Source.local`.

        Raises:
            SourceError: also for a git-lfs pointer, which stands where the file should.
        """
        self.require(path)
        if path in self._beside:
            return self._beside[path]
        if path != self.label:
            raise SourceError(f"{self.label}: {path} is not a file on this machine")
        if is_pointer(self.place):
            raise SourceError(
                f"{self.label} is a git-lfs pointer, not the file", hint="run 'git lfs pull' in its folder"
            )
        return self.place

    def fetch(self, paths: Sequence[str], progress: FetchProgress | None = None) -> None:
        """Check that the file may be read; see :meth:`Source.fetch`."""
        for path in paths:
            if not os.access(self.local(path), os.R_OK):
                raise SourceError(f"{path} cannot be read: no permission", hint=CHECK_PERMISSIONS)

    def read_json(self, path: str, most: int = CONFIG_BYTES) -> Any:
        """The config's value; see :meth:`Source.read_json`."""
        return self.config if path == self._at and self.config is not None else super().read_json(path, most)
