"""Documents of ``plan``, ``quantize``, ``repack``, ``convert``, ``migrate`` and ``demo``. Sizes and peaks in bytes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from aoconvert.checkpoint.manifest import (
    ConfigEntry,
    DeviationEntry,
    LayoutEntry,
    LeftOutEntry,
    OriginalEntry,
    Totals,
)
from aoconvert.documents.base import Document, SizedFile
from aoconvert.documents.publishing import EvalDocument, VerifyDocument


class PlannedLora(Document):
    """A LoRA that is added: its weights file, and the factor that the user gave."""

    label: str
    repo_id: str | None
    revision: str | None
    path: str
    weight: float
    size: int
    sha256: str


class PlanSource(Document):
    """The source, pinned to its commit where it is a Hub repo."""

    kind: Literal["hub", "folder", "file"]
    repo_id: str | None
    revision: str | None
    label: str
    subfolder: str | None
    config: ConfigEntry | None = Field(description="of a single file: where its config comes from")
    loras: list[PlannedLora] = Field(description="that are added, in this order")


class PlannedTensor(Document):
    """One tensor: what happens to it, and why it is not quantized. Sizes in bytes."""

    name: str
    shape: list[int]
    dtype: str
    action: Literal["quantize", "cast", "keep", "tied", "carry"]
    scheme: str | None
    reason: str | None
    bytes_in: int
    bytes_out: int
    device: str | None = Field(
        description="the device it is quantized on, where that is a CPU although the run uses a GPU"
    )
    file: str | None


class PlannedTotals(Totals):
    """Sums over a component."""


class PlannedComponent(Document):
    """One model that is quantized."""

    name: str
    library: str
    class_name: str = Field(alias="class")
    scheme: str
    config: dict[str, Any] = Field(description="torchao.core.config.config_to_dict")
    original: OriginalEntry | None = Field(
        default=None, description="how the source is quantized already; absent where it is not"
    )
    layout: LayoutEntry
    tensors: list[PlannedTensor]
    missing: list[LeftOutEntry] = Field(
        description="tensors that the checkpoint does not hold; the library initializes them"
    )
    dropped: list[LeftOutEntry] = Field(description="tensors that the weights files hold and the result does not")
    files: list[SizedFile]
    totals: PlannedTotals


class PlannedPartTensor(Document):
    """A tensor of a part that is not quantized."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str


class PlannedPart(Document):
    """A part of a pipeline that is not quantized, and is written as .bin."""

    name: str
    path: str
    library: str
    class_name: str = Field(alias="class")
    tensors: list[PlannedPartTensor]
    files: list[SizedFile]


class LeftBehind(Document):
    """A file of the source that is not copied."""

    path: str
    reason: str


class Needs(Document):
    """The disk space and memory that the run needs, in bytes."""

    disk_bytes: int
    device_peak_bytes: int
    host_peak_bytes: int


class PlanDocument(Document):
    """``plan --json`` and ``quantize --dry-run --json``."""

    schema_version: Literal[1]
    source: PlanSource
    components: list[PlannedComponent]
    unquantized: list[PlannedPart]
    copied: list[SizedFile]
    left_behind: list[LeftBehind]
    needs: Needs
    warnings: list[str]
    problems: list[str]


class Skipped(Document):
    """A matrix that is not quantized."""

    name: str
    reason: str


class QuantizedComponent(Document):
    """One model that was quantized. ``worst_sqnr_db`` is the SQNR of its worst weight."""

    name: str
    class_name: str
    scheme: str
    worst_sqnr_db: float | None
    bits_per_weight: float


class QuantizeDocument(Document):
    """``quantize --json``. Sizes and peaks in bytes."""

    output: str
    manifest: str
    scheme: str
    worst_sqnr_db: float | None
    components: list[QuantizedComponent]
    seconds: float
    bytes_in: int
    bytes_out: int
    parameters: int
    quantized_parameters: int
    quantized_fraction: float = Field(description="as a fraction of the parameters outside embeddings")
    peak_host_bytes: int
    peak_device_bytes: int
    skipped: list[Skipped]
    warnings: list[str]
    resumed: int = Field(description="tensors that an earlier run had finished")
    verification: VerifyDocument | None = Field(default=None, description="with --verify")
    evaluation: EvalDocument | None = Field(default=None, description="with --eval")


class DemoDocument(QuantizeDocument):
    """``demo --json``."""

    source: str
    verification: VerifyDocument
    card: list[str] = Field(description="files of the model card")


class RepackedLayout(LayoutEntry):
    """The layout of a component now, and the packing it had."""

    component: str
    before: str


class RepackDocument(Document):
    """``repack --json``."""

    output: str
    manifest: str
    layouts: list[RepackedLayout]
    weights: int
    bytes_out: int
    unconfirmed: str | None
    seconds: float


class ConvertDocument(Document):
    """``convert --json``."""

    output: str
    manifest: str
    format: str
    files: int
    tensors: int
    bytes_out: int
    seconds: float


class MigratedTensors(Document):
    """How many tensors of what was migrated became what; ``unchanged`` ones were not quantized before."""

    carried: int
    dequantized: int
    requantized: int
    unchanged: int


class MigrateDocument(Document):
    """``migrate --json``."""

    output: str
    manifest: str
    kind: str
    tensors: MigratedTensors
    deviations: list[DeviationEntry]
    schemes: list[str]
    bytes_out: int
    warnings: list[str]
    seconds: float
