"""What came out of a tensor and of a component."""

from __future__ import annotations

from dataclasses import dataclass

from aoconvert.formats.base import SealedFile, WrittenTensor
from aoconvert.schemes.error_stats import ErrorStats


@dataclass(frozen=True)
class TensorResult:
    """What was written for one tensor of the plan.

    ``repaired``: rows of zeros that were given a scale; ``device``: the type of the one that quantized it.
    """

    written: WrittenTensor
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    repaired: int = 0
    device: str | None = None

    @classmethod
    def of(cls, written: WrittenTensor, error: ErrorStats | None, device: str | None) -> TensorResult:
        """With the error of a quantized weight."""
        return cls(written) if error is None else cls(written, error.sqnr_db, error.largest, error.repaired, device)


@dataclass
class Seconds:
    """Time each stage was at work, waiting not counted."""

    reader: float = 0.0
    quantize: float = 0.0
    writer: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.reader + other.reader, self.quantize + other.quantize, self.writer + other.writer)


@dataclass(frozen=True)
class ComponentResult:
    """A component's tensors by name, its sealed files by output path, and where the time went."""

    tensors: dict[str, TensorResult]
    files: dict[str, SealedFile]
    seconds: Seconds
