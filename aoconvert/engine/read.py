"""Where the tensors of a component come from: the checkpoint's files, or what transformers merged from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from aoconvert.engine.carrying import read_codes
from aoconvert.engine.lora import LoraSum
from aoconvert.engine.merging import Merging, open_merging
from aoconvert.errors import ReadError, SourceError
from aoconvert.formats.digest import FileDigest, Mark, damaged_in_cache
from aoconvert.formats.sharded import CheckpointReader
from aoconvert.models.base import Rows, SourceTensor
from aoconvert.originals import make_rows
from aoconvert.planning.inventory import Readable
from aoconvert.planning.types import ComponentPlan, StreamedPlan
from aoconvert.sources import Source

if TYPE_CHECKING:
    from aoconvert.planning.types import Plan


class ComponentReading:
    """Reads the tensors of one component and takes the SHA-256 of every weights file on the way.

    Args:
        plan: the component.
        whole: the plan it belongs to.
        scratch: folder on the output's disk, for tensors that must be merged first.
        digests: of weights files that an earlier run read in part, by their path in the source.
        hashed: take the digests; without, there are none.

    Raises:
        SourceError: no weights, damaged files, or transformers refuses the checkpoint.
    """

    def __init__(
        self,
        plan: StreamedPlan,
        whole: Plan,
        scratch: Path,
        digests: Mapping[str, FileDigest] | None = None,
        *,
        hashed: bool = True,
    ) -> None:
        if plan.weights is None:
            raise SourceError(f"{plan.component.title}: the source has no weights")
        self._source: Source = whole.source
        self._weights = plan.weights
        earlier, files = digests or {}, plan.weights.files if hashed else ()
        self._digests = {path: earlier.get(path) or FileDigest(self._source.local(path)) for path in files}
        observe = self._feed if hashed else None
        self._reader = CheckpointReader(
            self._source.root, plan.weights.files, plan.weights.index, observe, self._source.headers
        )
        self._merging: Merging | None = open_merging(plan, whole, scratch, self._load)
        self._made = plan.made if isinstance(plan, ComponentPlan) else {}
        self._carried = {tensor.name for tensor in plan.tensors if tensor.carried}
        self._loras = LoraSum(plan.deltas if isinstance(plan, ComponentPlan) else {})
        self._copied = isinstance(plan, ComponentPlan) and plan.copied is not None
        if self._copied:  # transformers read the files: each tensor may be made of any byte of them
            for digest in self._digests.values():
                digest.read_all()

    def read(self, tensor: Readable, rows: Rows | None, into: torch.Tensor | None) -> torch.Tensor:
        """The tensor, or its rows (start, stop), in host memory; in the source's dtype, or float32 with LoRAs.

        Args:
            tensor: one of the component's.
            rows: of dimension 0; ``None`` for the whole.
            into: uint8 memory that is large enough, or ``None``; may be left unused.

        Raises:
            ReadError: a disk error, or a file that changed since the plan.
        """
        return self._loras.add(tensor.name, self._read(tensor, rows, into), rows)

    def codes(self, tensor: Readable, rows: Rows | None) -> Mapping[str, torch.Tensor] | None:
        """Codes and scales of the same rows, as the original stores them; ``None`` where they are not kept.

        Raises:
            ReadError: as ``read``.
        """
        if tensor.name not in self._carried:
            return None
        assert tensor.origin is not None
        codes = self._made[tensor.origin[1]].codes
        assert codes is not None
        return read_codes(codes, rows, self._load)

    def _read(self, tensor: Readable, rows: Rows | None, into: torch.Tensor | None) -> torch.Tensor:
        """As ``read``, without LoRAs."""
        if tensor.origin is None:
            assert self._merging is not None
            return self._merging.read(tensor, rows, into)
        path, name = tensor.origin
        dtype: torch.dtype = getattr(torch, tensor.source_dtype)
        if (made := self._made.get(name)) is not None:
            return make_rows(made, rows, self._load, into, dtype)
        return self._load(SourceTensor(path, name, dtype, tensor.shape, tensor.bytes_read), rows, into)

    def _feed(self, file: str, offset: int, data: memoryview) -> None:
        self._digests[file].feed(offset, data)

    def marks(self) -> Mapping[str, Mark]:
        """How far each weights file was hashed, of those that were read since the last call."""
        marks = {file: digest.mark(again=self._copied) for file, digest in self._digests.items()}
        return {file: mark for file, mark in marks.items() if mark is not None}

    def _load(self, source: SourceTensor, rows: Rows | None, into: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor of the checkpoint, or rows of it; the bytes that are read go into the file's digest."""
        if source.formula is not None:
            return make_rows(source, rows, self._load, into)
        path, name = source.file, source.name
        info = self._reader.infos().get(name)
        if info is None or (info.file, info.shape, info.dtype) != (path, source.shape, source.dtype):
            raise ReadError(f"{path}: {name} changed since the plan was made", hint="run again")
        return self._reader.read(name, into) if rows is None else self._reader.read_rows(name, *rows, into)

    def digests(self) -> Mapping[str, str]:
        """SHA-256 (hex) of each weights file, by its path in the source; what was not read yet is read now.

        Raises:
            ReadError: a file of the Hub cache is not what the Hub said it is.
        """
        found = {}
        for path, digest in self._digests.items():
            expected = self._source.files()[path].sha256
            found[path] = digest.finish(expected)
            if expected is not None and expected != found[path]:
                raise damaged_in_cache(path)
        return found

    def close(self) -> None:
        """Close every file and remove what was merged."""
        self._reader.close()
        self._loras.close()
        if self._merging is not None:
            self._merging.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
