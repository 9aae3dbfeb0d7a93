"""What a job is told to do: a JSON text in one environment variable, and the places where its volumes are mounted."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

ORDER_VARIABLE = "AOCONVERT_JOB"
BUCKET_VARIABLE = "AOCONVERT_JOB_BUCKET"
SOURCES_VARIABLE = "AOCONVERT_JOB_SOURCES"

BUCKET_MOUNT = "/aoconvert/bucket"
SOURCES_MOUNT = "/aoconvert/sources"

MOST_BYTES = 100_000
"""Of an order: Linux takes 128 KiB for a variable."""


class Pin(BaseModel):
    """A source, whose commit is mounted.

    Attributes:
        revision: the branch or tag that the release file means.
        commit: what that was when the job was planned.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo_id: str
    revision: str
    commit: str

    @property
    def place(self) -> str:
        """Name of the folder that the commit is mounted as."""
        return f"{self.repo_id.replace('/', '--')}--{self.commit[:12]}"


class Wishes(BaseModel):
    """The options of ``release`` that the job gets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    only: tuple[str, ...] = ()
    skip_push: bool = False
    owner: str | None = None
    fail_fast: bool = False
    evaluate: bool | None = None
    jobs: int | None = None


class Order(BaseModel):
    """A release for a job.

    Attributes:
        path: of the release file among ``files``.
        files: relative path → text: the release file, and the recipes beside it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    files: dict[str, str]
    pins: tuple[Pin, ...]
    options: Wishes
