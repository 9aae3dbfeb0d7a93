"""What a job is told to do: a JSON text in one environment variable, and the places where its volumes are mounted."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

ORDER_VARIABLE = "AOCONVERT_JOB"
BUCKET_VARIABLE = "AOCONVERT_JOB_BUCKET"
CACHE_VARIABLE = "HF_HUB_CACHE"

BUCKET_MOUNT = "/aoconvert/bucket"
CACHE_MOUNT = "/aoconvert/hub"

MOST_BYTES = 100_000
"""Of an order: Linux takes 128 KiB for a variable."""


class Pin(BaseModel):
    """A source, whose commit is mounted where the Hub client's cache would have it.

    Attributes:
        revision: the branch or tag that the release file means.
        commit: what that was when the job was planned.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo_id: str
    revision: str
    commit: str

    @property
    def folder(self) -> str:
        """The repo's folder in the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache."""
        return f"models--{self.repo_id.replace('/', '--')}"

    @property
    def mount(self) -> str:
        """Where the commit is mounted."""
        return f"{CACHE_MOUNT}/{self.folder}/snapshots/{self.commit}"


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
