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


class FailedEvent(_OfVariant):
    """A variant could not be made or published."""

    event: Literal["failed"]
    error: Failure


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
            | FailedEvent
            | ReleaseDocument,
            Field(discriminator="event"),
        ]
    ]
):
    """A line of ``release --json``. A run that is refused or stopped ends with an error document, without a summary."""
