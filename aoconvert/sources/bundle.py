"""A source that is one weights file with all models of a pipeline; what else the pipeline has comes from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aoconvert.json_text import CONFIG_BYTES
from aoconvert.sources.base import FetchProgress, Source, SourceFile
from aoconvert.sources.file import ConfigOrigin, FileSource

INDEX = "model_index.json"
# what diffusers fetches for a single file, in loaders.single_file._download_diffusers_model_config_from_hub
_SMALL = re.compile(r"[^/]+/[^/]+\.(json|txt|model)")
_WEIGHTS_INDEX = re.compile(r".*\.index\.(.+\.)?json")


class BundleSource(FileSource):
    """One weights file, and the configs, tokenizers and scheduler of the pipeline that it is.

    Args:
        place: the file.
        around: the pipeline that has those.
        origin: what the manifest says of that; ``None`` for the result itself.
        elsewhere: model → names of the file's tensors that other models take.
        null: parts that the pipeline goes without.
    """

    def __init__(
        self,
        place: Path,
        around: Source,
        origin: ConfigOrigin | None,
        elsewhere: Mapping[str, frozenset[str]],
        null: Sequence[str] = (),
    ) -> None:
        super().__init__(place, None, origin)
        self.around, self.elsewhere = around, elsewhere
        self.rewritten = frozenset({INDEX}) if null else frozenset()
        self._null = frozenset(null)
        gone = tuple(f"{name}/" for name in null)
        for path, file in around.files().items():
            wanted = path == INDEX or (_SMALL.fullmatch(path) and not _WEIGHTS_INDEX.fullmatch(path))
            if wanted and not path.startswith((".", *gone)):
                self._files[path] = file if path != INDEX or not null else SourceFile(path, file.size)

    def __repr__(self) -> str:
        return f"BundleSource({self.label!r})"

    def is_local(self, path: str) -> bool:
        """Whether it is there; see :meth:`Source.is_local`."""
        return super().is_local(path) or self.around.is_local(path)

    def local(self, path: str) -> Path:
        """The file itself; see :meth:`Source.local`."""
        self.require(path)
        return super().local(path) if path == self.label else self.around.local(path)

    def fetch(self, paths: Sequence[str], progress: FetchProgress | None = None) -> None:
        """Check that the file may be read, and fetch what is beside it; see :meth:`Source.fetch`."""
        for path in paths:
            self.require(path)
        super().fetch([path for path in paths if path == self.label])
        self.around.fetch([path for path in paths if path != self.label], progress)

    def read_json(self, path: str, most: int = CONFIG_BYTES) -> Any:
        """The value; what the pipeline goes without is null, and nothing says that it is quantized."""
        self.require(path)
        value = self.around.read_json(path, most)
        if path == INDEX and isinstance(value, dict):
            return {key: [None, None] if key in self._null else item for key, item in value.items()}
        if isinstance(value, dict) and self.origin is None:
            value.pop("quantization_config", None)
        return value
