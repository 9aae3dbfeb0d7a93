"""Where the tensors of a component come from: the checkpoint's files, or what transformers merged from them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from aoconvert.errors import ReadError, SourceError
from aoconvert.models import transformers as transformers_models
from aoconvert.planning.types import ComponentPlan, TensorPlan
from aoconvert.readers.digest import FileDigest
from aoconvert.readers.multi import CheckpointReader
from aoconvert.readers.safetensors import SafetensorsReader
from aoconvert.sources import Source

if TYPE_CHECKING:
    from aoconvert.planning.types import Plan


class ComponentReading:
    """Reads the tensors of one component and takes the SHA-256 of every weights file on the way.

    Args:
        plan: the component.
        whole: the plan it belongs to.
        scratch: folder on the output's disk, for tensors that must be merged first.

    Raises:
        SourceError: no weights, damaged files, or transformers refuses the checkpoint.
    """

    def __init__(self, plan: ComponentPlan, whole: Plan, scratch: Path) -> None:
        if plan.weights is None:
            raise SourceError(f"{plan.component.title}: the source has no weights")
        self._source: Source = whole.source
        self._weights = plan.weights
        self._folder: Path | None = None
        self._merged: Mapping[str, tuple[Path, str]] = {}
        self._open: tuple[Path, SafetensorsReader] | None = None
        self._digests = {path: FileDigest(self._source.local(path)) for path in plan.weights.files}
        self._reader = CheckpointReader(self._source.root, plan.weights.files, plan.weights.index)
        if plan.merged:
            self._merge(plan, whole, scratch)

    def _merge(self, plan: ComponentPlan, whole: Plan, scratch: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="merged-", dir=scratch))
        config = self._source.local(f"{plan.component.folder}/config.json".lstrip("/"))
        dtype = next(t.dtype for t in plan.tensors if t.origin is None and t.action != "tied")
        self._merged = transformers_models.merged_reader_index(
            plan.component,
            config.parent,
            self._folder,
            getattr(torch, dtype),
            variant=whole.variant,
            code_root=config.parent if whole.trust_remote_code else None,
        )

    def read(self, tensor: TensorPlan) -> torch.Tensor:
        """The tensor in host memory, in the source's dtype.

        Raises:
            ReadError: a disk error, or a file that changed since the plan.
        """
        if tensor.origin is None:
            return self._read_merged(tensor)
        path, name = tensor.origin
        data = self._reader.read(name)
        if tuple(data.shape) != tensor.shape or str(data.dtype) != f"torch.{tensor.source_dtype}":
            raise ReadError(f"{path}: {name} is not what it was when the plan was made", hint="run again")
        offset = self._reader.infos()[name].offset
        self._digests[path].feed(offset, data)
        return data

    def _read_merged(self, tensor: TensorPlan) -> torch.Tensor:
        place = self._merged.get(tensor.name)
        if place is None:
            raise ReadError(f"transformers did not build {tensor.name}", hint="does from_pretrained open this model?")
        path, name = place
        if self._open is None or self._open[0] != path:
            if self._open is not None:
                self._open[1].close()
            self._open = (path, SafetensorsReader(path))
        return self._open[1].read(name)

    def digests(self) -> Mapping[str, str]:
        """SHA-256 (hex) of each weights file, by its path in the source; what was not read yet is read now.

        Raises:
            ReadError: a file of the Hub cache is not what the Hub said it is.
        """
        found = {}
        for path, digest in self._digests.items():
            found[path] = digest.finish()
            expected = self._source.files()[path].sha256
            if expected is not None and expected != found[path]:
                raise ReadError(
                    f"{path} is damaged: its SHA-256 is not the one the Hub names",
                    hint="delete it from the Hub cache and run again",
                )
        return found

    def close(self) -> None:
        """Close every file and remove what was merged."""
        self._reader.close()
        if self._open is not None:
            self._open[1].close()
            self._open = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
