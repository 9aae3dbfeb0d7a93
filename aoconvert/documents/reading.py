"""Documents of ``inspect``, ``diff``, ``schemes``, ``env`` and ``cache``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aoconvert.documents.base import Document


class InspectedFile(Document):
    """A weights file: tensors and their classes, counted."""

    path: str
    size: int
    format: str
    tensors: int
    classes: dict[str, int]
    globals: list[str] = Field(description="names in its pickle")


class Range(Document):
    """A range of releases, both ends included; ``max`` is null where the newest known release is still in it."""

    min: str | None
    max: str | None


class Writer(Document):
    """The program that wrote a checkpoint, null where unknown; ``how`` says what tells."""

    tool: str | None
    torchao: str | None
    torch: str | None
    python: str | None
    diffusers: str | None
    transformers: str | None
    torchao_range: Range | None
    how: str | None


class LoadingTorchao(Range):
    """Which torchao loads it and computes the right values."""

    why: list[str]
    best: str | None
    possible: bool
    imports: list[str]
    safe_globals: list[str]


class LoadsWith(Document):
    """What loads it: torchao (null where that is not what does), and other packages."""

    torchao: LoadingTorchao | None
    packages: list[str]


class _Inspected(Document):
    kind: str
    library: str | None
    class_name: str | None = Field(alias="class")
    scheme: str | None
    files: list[InspectedFile]
    tensor_classes: dict[str, int]
    parameters: int
    quantized_parameters: int
    bytes: int
    layout_device: str
    written_by: Writer
    globals: list[str]
    loads_with: LoadsWith
    loads_here: bool | None
    why_not: str | None
    advice: list[str]
    unsafe: list[str]


class InspectedComponent(_Inspected):
    """One model."""

    name: str
    min_capability: list[int] | None


class InspectDocument(_Inspected):
    """``inspect --json``."""

    path: str
    revision: str | None
    bytes_fetched: int
    next: str | None = Field(description="the command that migrates, verifies or quantizes it; null where none does")
    components: list[InspectedComponent]


class DifferentTensor(Document):
    """A tensor that both have and that differs; ``what`` is the first thing that does."""

    name: str
    what: Literal["codes", "scales", "dtype", "shape", "class", "values"] = Field(
        description="class: another tensor class, or the same one with other settings"
    )
    sqnr_db: float | None = Field(description="of the values; null where they are equal or cannot be compared")
    detail: str


class DiffDocument(Document):
    """``diff --json``. Names in a pipeline begin with the part's, as in ``transformer/proj.weight``."""

    equal: bool
    same: int = Field(description="tensors that are bit for bit the same")
    different: list[DifferentTensor] = Field(description="the biggest difference first")
    only_a: list[str]
    only_b: list[str]
    tied: list[str] = Field(description="names that only one has, for a tensor that both have under another name")
    left_out: list[str] = Field(description="parts of a pipeline that one model was not compared with")


class SchemeLayout(Document):
    """One of the layouts that ``--layout-device`` chooses among."""

    layout_device: str
    packing: str
    tensor_class: str
    quantizes_here: bool
    why_not_quantized: str | None
    runs_here: bool
    why_not: str | None
    unconfirmed: str | None


class SchemeDocument(Document):
    """``schemes NAME --json``."""

    name: str
    aliases: list[str]
    config: str
    settings: dict[str, str]
    weight_dtype: str
    tensor_class: str
    packing: str
    group_size_option: bool
    requires: list[str]
    min_torchao_to_load: str
    runs_here: bool
    why_not: str | None
    summary: str
    source: str
    quantizes_here: bool
    why_not_quantized: str | None
    activation_dtype: str | None
    granularity: str
    bytes_per_parameter: float
    device: str
    min_capability: list[int] | None
    ranks: list[int]
    from_dtypes: list[str]
    multiples: list[int]
    embeddings: bool
    layouts: list[SchemeLayout]
    notes: list[str]


class EnvDevice(Document):
    """A device; ``capability`` is CUDA's."""

    device: str
    name: str
    capability: list[int] | None


class EnvHub(Document):
    """How the Hub is reached; of the token only whether there is one."""

    endpoint: str
    token: bool
    offline: bool


class EnvDocument(Document):
    """``env --json``."""

    versions: dict[str, str | None]
    platform: str
    cores: int
    memory_bytes: int
    devices: list[EnvDevice]
    device: str = Field(description="what --device auto picks")
    kernels: str
    caches: dict[str, str | None]
    hub: EnvHub
    variables: dict[str, str]


class CacheKind(Document):
    """One kind of thing in the cache."""

    name: str
    files: int
    bytes: int
    limit: int | None = Field(default=None, description="bytes that may be kept of it; null where there is no limit")


class CacheDocument(Document):
    """``cache --json``."""

    path: str | None
    bytes: int
    kinds: list[CacheKind]
    cleared: bool
