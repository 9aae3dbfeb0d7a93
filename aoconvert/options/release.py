"""What ``release`` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

from aoconvert.options.hub import HubOptions

Engine = Literal["local", "ray"]


class ReleaseKwargs(TypedDict, total=False):
    """``ReleaseOptions`` as keyword arguments."""

    dry_run: bool
    only: tuple[str, ...]
    skip_push: bool
    owner: str | None
    fail_fast: bool
    output_root: Path
    evaluate: bool | None
    engine: Engine
    address: str | None
    jobs: int | None
    token: str | None
    cache_dir: Path | None
    local_files_only: bool


@dataclass(frozen=True)
class ReleaseOptions:
    """How to carry out a release file.

    Attributes:
        dry_run: plan every variant, and change nothing.
        only: names of variants, with ``*`` and ``?``; empty: all.
        skip_push: make and judge, publish nothing.
        owner: of the repos, in place of the file's.
        fail_fast: stop at the first variant that fails or misses a gate; else go on with the others.
        output_root: a folder for each variant goes below it, and ``release.json``.
        evaluate: run ``eval``; ``None``: where a gate needs it.
        engine: who makes the variants: this machine, or a Ray cluster.
        address: of the cluster; ``None``: ``RAY_ADDRESS``, or else one that is started on this machine.
        jobs: so many variants are made at a time, each in a process of its own; ``None``: one for each GPU,
            on Ray as many as the cluster takes.
        token, cache_dir, local_files_only: for the Hub.
    """

    dry_run: bool = False
    only: tuple[str, ...] = ()
    skip_push: bool = False
    owner: str | None = None
    fail_fast: bool = False
    output_root: Path = Path("releases")
    evaluate: bool | None = None
    engine: Engine = "local"
    address: str | None = None
    jobs: int | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    local_files_only: bool = False

    @property
    def hub(self) -> HubOptions:
        """How the Hub is asked."""
        return HubOptions(None, self.token, self.cache_dir, self.local_files_only)
