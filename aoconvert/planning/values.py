"""Values of a checkpoint that a plan needs: whether two tensors are the same, and small ones that say what is there."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING, Self

from aoconvert.formats.safetensors.header import header_of
from aoconvert.models.base import SourceTensor
from aoconvert.originals import make_rows

if TYPE_CHECKING:
    import torch

    from aoconvert.formats.base import TensorReader
    from aoconvert.sources import Source

_FIRST, _GROWTH, _MOST = 1 << 16, 8, 1 << 24


class Values:
    """Reads from files on this machine, and otherwise by ranged requests from the Hub (safetensors only)."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._readers: dict[str, TensorReader] = {}

    def are_equal(self, one: SourceTensor, other: SourceTensor, dtype: torch.dtype | None) -> bool:
        """Whether ``torch.equal`` says so after both are cast to ``dtype``, as when the library compares them.

        Args:
            one: a tensor of the source.
            other: another one.
            dtype: ``None``: the dtype that holds both.

        Raises:
            AoconvertError: they could not be read.
        """
        import torch

        if one.shape != other.shape:
            return False
        if one.place is not None and (one.file, one.place, one.dtype) == (other.file, other.place, other.dtype):
            return True  # two names for one storage, as ``.bin`` files have them
        wanted = dtype or torch.promote_types(one.dtype, other.dtype)
        for start, stop in _blocks(one.shape, max(one.dtype.itemsize, other.dtype.itemsize)):
            first, second = (self._rows(tensor, start, stop).to(wanted) for tensor in (one, other))
            if not torch.equal(first, second):
                return False
        return True

    def _reader(self, file: str) -> TensorReader:
        from aoconvert.formats.registry import open_reader

        if file not in self._readers:
            self._readers[file] = open_reader(self._source.local(file))
        return self._readers[file]

    def _rows(self, tensor: SourceTensor, start: int, stop: int) -> torch.Tensor:
        import torch

        if tensor.formula is not None:
            return make_rows(tensor, (start, stop), self._load)
        if self._source.is_local(tensor.file):
            reader = self._reader(tensor.file)
            return reader.read_rows(tensor.name, start, stop) if tensor.shape else reader.read(tensor.name)
        row = prod(tensor.shape[1:]) * tensor.dtype.itemsize
        begin = header_of(self._source, tensor.file).entries[tensor.name].begin + start * row
        data = self._source.read_range(tensor.file, begin, (stop - start) * row)
        return torch.frombuffer(bytearray(data), dtype=tensor.dtype).reshape(-1, *tensor.shape[1:])

    def _load(self, tensor: SourceTensor, rows: tuple[int, int] | None) -> torch.Tensor:
        return self.read(tensor) if rows is None else self._rows(tensor, *rows)

    def read(self, tensor: SourceTensor) -> torch.Tensor:
        """A small tensor.

        Raises:
            AoconvertError: it could not be read.
        """
        rows = self._rows(tensor, 0, tensor.shape[0] if tensor.shape else 1)
        return rows.reshape(tensor.shape)

    def close(self) -> None:
        """Close the files."""
        while self._readers:
            self._readers.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Rows (start, stop), few at first: tensors that differ nearly always differ at once."""
    if 0 in shape:
        return
    rows = shape[0] if shape else 1
    row, start, size = prod(shape[1:]) * itemsize, 0, _FIRST
    while start < rows:
        stop = min(rows, start + max(1, size // row))
        yield start, stop
        start, size = stop, min(_MOST, size * _GROWTH)
