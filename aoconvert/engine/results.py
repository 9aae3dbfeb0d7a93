"""What came out of a tensor, of a component, and of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.checkpoint.manifest import MANIFEST_NAME, Manifest
from aoconvert.formats.base import SealedFile, WrittenTensor
from aoconvert.schemes.error_stats import ErrorStats

if TYPE_CHECKING:
    from aoconvert.planning import Plan


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


@dataclass(frozen=True)
class QuantizeResult:
    """What a run did; ``to_dict`` is what ``aoconvert quantize --json`` prints. Bytes, seconds.

    ``resumed`` is the number of tensors that an earlier run had finished.
    """

    output: Path
    manifest: Manifest
    seconds: float
    bytes_in: int
    bytes_out: int
    parameters: int
    quantized_parameters: int
    quantized_fraction: float
    peak_host_bytes: int
    peak_device_bytes: int
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    resumed: int

    @classmethod
    def of(cls, plan: Plan, manifest: Manifest, warnings: tuple[str, ...], resumed: int) -> QuantizeResult:
        """Sum up what the manifest says of a finished run."""
        totals = [component.totals for component in manifest.components]
        outside = sum(t.quantized_parameters / t.quantized_fraction for t in totals if t.quantized_fraction)
        quantized = sum(t.quantized_parameters for t in totals)
        named = len(plan.components) > 1
        return cls(
            output=plan.output,
            manifest=manifest,
            seconds=manifest.run.seconds,
            bytes_in=sum(t.bytes_in for t in totals),
            bytes_out=sum(t.bytes_out for t in totals),
            parameters=sum(t.parameters for t in totals),
            quantized_parameters=quantized,
            quantized_fraction=quantized / outside if outside else 0.0,
            peak_host_bytes=manifest.run.peak_host_bytes,
            peak_device_bytes=manifest.run.peak_device_bytes,
            skipped=tuple(
                (f"{item.component.name}.{tensor.name}" if named else tensor.name, tensor.reason or "")
                for item in plan.components
                for tensor in item.skipped
            ),
            warnings=warnings,
            resumed=resumed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Keys are a contract. ``worst_sqnr_db`` is the lowest of all weights, null where nothing has an error."""
        components = [
            {
                "name": item.name,
                "class_name": item.class_name,
                "scheme": item.scheme,
                "worst_sqnr_db": item.totals.worst_sqnr_db,
                "bits_per_weight": item.totals.bits_per_weight,
            }
            for item in self.manifest.components
        ]
        worst = [item.totals.worst_sqnr_db for item in self.manifest.components]
        return {
            "output": str(self.output),
            "manifest": str(self.output / MANIFEST_NAME),
            "scheme": "+".join(dict.fromkeys(item.scheme for item in self.manifest.components)),
            "worst_sqnr_db": min((value for value in worst if value is not None), default=None),
            "components": components,
            "seconds": round(self.seconds, 3),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "quantized_fraction": self.quantized_fraction,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "warnings": list(self.warnings),
            "resumed": self.resumed,
        }
