"""LoRAs added to what is read: in float32, a few rows at a time, by the arithmetic of PEFT's ``get_delta_weight``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from aoconvert.errors import ReadError
from aoconvert.formats.digest import FileDigest
from aoconvert.formats.registry import open_reader
from aoconvert.models.recording import Replay

if TYPE_CHECKING:
    from aoconvert.formats.base import TensorReader
    from aoconvert.models.base import Rows, SourceTensor
    from aoconvert.models.lora import Delta
    from aoconvert.models.lora_files import LoraFile


class LoraSum:
    """Adds what LoRAs hold for a component's tensors.

    Args:
        deltas: tensor → what is added to it, in that order.
    """

    def __init__(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        self._deltas = deltas
        self._readers: dict[str, TensorReader] = {}
        self._kept: tuple[str, list[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]] | None = None

    def add(self, name: str, data: torch.Tensor, rows: Rows | None) -> torch.Tensor:
        """The rows of a tensor with everything added: float32, where anything is.

        Args:
            name: of the tensor.
            data: its rows, which may be changed.
            rows: which (start, stop); ``None``: all.

        Raises:
            ReadError: a LoRA changed since the plan, or cannot be read.
        """
        deltas = self._deltas.get(name)
        if not deltas:
            return data
        if self._kept is None or self._kept[0] != name:
            self._kept = None  # before the next are read
            self._kept = (name, [self._factors(delta) for delta in deltas])
        result = data.to(torch.float32)
        start, stop = rows or (0, result.shape[0])
        for delta, factors in zip(deltas, self._kept[1], strict=True):
            result += _rows(delta, factors, start, stop)
        return result

    def _factors(self, delta: Delta) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """B and A in float32; of a convolution and a bias, all that is added."""
        replay = Replay(lambda source, rows: self._load(delta.lora, source, rows))
        b = replay.make(delta.b).to(torch.float32)
        if delta.a is None:
            return b * delta.scaling
        a = replay.make(delta.a).to(torch.float32)
        if delta.kind != "convolution":
            return b, a
        if a.shape[2:] == (1, 1):
            flat = b.squeeze(3).squeeze(2) @ a.squeeze(3).squeeze(2)
            return flat.unsqueeze(2).unsqueeze(3) * delta.scaling
        convolve = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[b.dim()]
        return convolve(a.transpose(0, 1), b).transpose(0, 1) * delta.scaling

    def _load(self, lora: LoraFile, source: SourceTensor, rows: Rows | None) -> torch.Tensor:
        if lora.sha256 not in self._readers:
            if FileDigest(lora.place).finish() != lora.sha256:
                raise ReadError(f"{lora.label} changed since the plan was made", hint="run again")
            self._readers[lora.sha256] = open_reader(lora.place)
        reader = self._readers[lora.sha256]
        return reader.read(source.name) if rows is None else reader.read_rows(source.name, *rows)

    def close(self) -> None:
        """Close the files, and release memory."""
        self._kept = None
        while self._readers:
            self._readers.popitem()[1].close()


def _rows(
    delta: Delta, factors: torch.Tensor | tuple[torch.Tensor, torch.Tensor], start: int, stop: int
) -> torch.Tensor:
    """What is added to rows ``start`` to ``stop``.

    Of a product any two rows or more have the bits that they have in the whole; for a single one BLAS takes another
    routine, so that one is computed with its neighbour.
    """
    if isinstance(factors, torch.Tensor):
        return factors[start:stop]
    b, a = factors
    count = b.shape[0] if delta.kind == "matrix" else a.shape[1]
    first = start - 1 if stop - start == 1 and start else start
    last = stop + 1 if stop - start == 1 and not start and count > 1 else stop
    made = b[first:last] @ a if delta.kind == "matrix" else (b @ a[:, first:last]).T
    return (made * delta.scaling)[start - first : stop - first]
