"""Documents of ``release``: a line for each event, and the summary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, RootModel

from aoconvert.checkpoint.evaluation import GateResult
from aoconvert.documents.base import Document
from aoconvert.documents.conversion import Needs, PlannedTotals
from aoconvert.releasing.record import Failure, Record


class ReleaseDocument(Record):
    """The last line of ``release --json``; without ``event`` it is ``release.json``."""

    event: Literal["summary"]


class _OfVariant(Document):
    variant: str = Field(description="its name in the release")


class PlannedEvent(_OfVariant):
    """A variant can be made. All are planned before any work."""

    event: Literal["planned"]
    needs: Needs
    totals: list[PlannedTotals] = Field(description="of each component")
    warnings: list[str] = Field(default_factory=list, description="what is not wrong, but should be known")


class VariantStartedEvent(_OfVariant):
    """The steps of a variant begin."""

    event: Literal["variant_started"]
    scheme: str = Field(description="name of the scheme, or of the recipe file")
    repo_id: str | None = Field(description="null: no owner is known, and nothing is to be published")


class ProgressEvent(Document):
    """Part of a stage is done: at most 20 of these per stage."""

    event: Literal["progress"]
    variant: str | None = Field(default=None, description="absent where several are at work together")
    variants: list[str] | None = Field(default=None, description="in place of variant")
    stage: str = Field(description="such as download, quantize, copy, upload")
    done_bytes: int
    total_bytes: int


class QuantizedEvent(_OfVariant):
    """The files of a variant are there."""

    event: Literal["quantized"]
    again: bool = Field(description="false: an earlier run made them")
    seconds: float | None = None
    bytes_out: int | None = None


class VerifiedEvent(_OfVariant):
    """A variant was verified."""

    event: Literal["verified"]
    again: bool = Field(description="false: an earlier run did it, with these files")
    ok: bool
    failed: list[str] = Field(description="checks that failed, and why")


class EvaluatedEvent(_OfVariant):
    """The outputs of a variant were compared with the original's."""

    event: Literal["evaluated"]
    again: bool = Field(description="false: an earlier run did it, with these files")
    metrics: dict[str, dict[str, float]] = Field(description="component → figure → value, as eval names them")


class GateFailedEvent(_OfVariant):
    """A variant misses gates and is not published."""

    event: Literal["gate_failed"]
    gates: list[GateResult] = Field(description="those that it misses")


class _OnTheHub(_OfVariant):
    repo_id: str
    url: str
    commit: str | None
    bytes_sent: int = Field(description="of all files that the Hub lacked")
    warnings: list[str] = Field(default_factory=list, description="what is not wrong, but should be known")


class PushedEvent(_OnTheHub):
    """A variant was published."""

    event: Literal["pushed"]


class UnchangedEvent(_OnTheHub):
    """The Hub had exactly this already."""

    event: Literal["unchanged"]


class CardUpdatedEvent(_OnTheHub):
    """At the end: what a variant's repo says of the others was brought up to date; the weights stayed as they were."""

    event: Literal["card_updated"]


class CardNotUpdatedEvent(_OfVariant):
    """What a variant's repo says of the others is out of date, and stays so."""

    event: Literal["card_not_updated"]
    reason: str


class FailedEvent(_OfVariant):
    """A variant could not be made or published."""

    event: Literal["failed"]
    error: Failure


class JobFlavor(Document):
    """The machine. Of several GPUs ``gpu_bytes`` is the memory of one."""

    name: str
    cores: int
    memory_bytes: int
    disk_bytes: int | None = Field(description="null: nobody says")
    gpu: str | None
    gpus: int
    gpu_bytes: int
    usd_per_hour: float
    reason: str = Field(description="why this one")


class JobNeeds(Document):
    """What the release takes of a machine."""

    memory_bytes: int
    disk_bytes: int
    gpus: int
    gpu_bytes: int = Field(description="of each GPU")


class JobPrices(Document):
    """Where the price is from."""

    origin: Literal["hub", "file"] = Field(description="file: the table that comes with aoconvert")
    read: str | None = Field(description="day on which the table was read; null: the Hub said so now")
    url: str


class JobBucket(Document):
    """What keeps the variants."""

    id: str
    exists: bool = Field(description="else it is made, private, when the job is started")


class JobVolume(Document):
    """What is mounted in the job: a source's commit, or the bucket."""

    type: Literal["model", "bucket"]
    source: str
    mount_path: str
    revision: str | None = None
    read_only: bool | None = None


class RunningJob(Document):
    """A job that has not ended."""

    id: str
    url: str


class ReleaseJobDocument(Document):
    """``release --engine hf-jobs``: the job, before it is started."""

    event: Literal["job_planned"]
    schema_version: Literal[1]
    engine: Literal["hf-jobs"]
    name: str
    namespace: str = Field(description="who pays")
    variants: list[str]
    flavor: JobFlavor
    needs: JobNeeds
    timeout_seconds: int = Field(description="of an attempt")
    timeout_reason: str
    attempts: int
    max_cost_usd: float = Field(description="every attempt takes all of its time")
    prices: JobPrices
    bucket: JobBucket
    volumes: list[JobVolume]
    dependencies: list[str] = Field(description="what is installed in the job")
    command: list[str]
    secrets: list[str] = Field(description="names; what they hold is in no document")
    running: RunningJob | None = Field(description="a job of this release, which --confirm follows")
    warnings: list[str]


class JobSubmittedEvent(Document):
    """A job is followed, which was started now, or by an earlier run."""

    event: Literal["job_submitted"]
    job_id: str
    url: str
    namespace: str
    again: bool = Field(description="false: an earlier run started it")


class JobStartedEvent(Document):
    """An attempt of a job begins."""

    event: Literal["job_started"]
    attempt: int


class RestoredEvent(Document):
    """What a job found in its bucket."""

    event: Literal["restored"]
    variants: list[str] = Field(description="that are whole")


class ReleaseEvent(
    RootModel[
        Annotated[
            PlannedEvent
            | VariantStartedEvent
            | ProgressEvent
            | QuantizedEvent
            | VerifiedEvent
            | EvaluatedEvent
            | GateFailedEvent
            | PushedEvent
            | UnchangedEvent
            | CardUpdatedEvent
            | CardNotUpdatedEvent
            | FailedEvent
            | ReleaseJobDocument
            | JobSubmittedEvent
            | JobStartedEvent
            | RestoredEvent
            | ReleaseDocument,
            Field(discriminator="event"),
        ]
    ]
):
    """A line of ``release --json``. A run that is refused or stopped ends with an error document, without a summary."""
