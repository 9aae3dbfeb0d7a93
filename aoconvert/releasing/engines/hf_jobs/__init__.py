"""A release as a job on Hugging Face's machines: planned, and started if asked (https://huggingface.co/docs/hub/jobs)."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from aoconvert.errors import UsageError
from aoconvert.options.jobs import JobOptions
from aoconvert.options.release import ReleaseKwargs, ReleaseOptions
from aoconvert.releasing.engines.hf_jobs.follow import OnLog, submit
from aoconvert.releasing.engines.hf_jobs.plan import JobPlan, plan_job
from aoconvert.releasing.record import Record
from aoconvert.releasing.told import Event, OnEvent

__all__ = ["JobPlan", "plan_job", "release_as_job", "submit"]


def _ignore(told: Event | str) -> None:
    """Nobody listens."""


def release_as_job(
    path: str | Path,
    job: JobOptions,
    *,
    on_event: OnEvent = _ignore,
    on_log: OnLog = _ignore,
    **options: Unpack[ReleaseKwargs],
) -> Record | JobPlan:
    """Make a release as a job on Hugging Face, or plan it only: a job costs money.

    Args:
        path: the release file (TOML).
        job: how to start it; without ``confirm`` nothing is sent.
        on_event: is told of the plan, and of each step in the job, as ``release --json`` prints it.
        on_log: gets every other line of the job's log.
        **options: fields of ``aoconvert.options.release.ReleaseOptions``.

    Returns:
        The record of the release, or the plan.

    Raises:
        AoconvertError: as ``plan_job`` and ``submit``.
    """
    wanted = ReleaseOptions(**options)
    if wanted.dry_run and job.confirm:
        raise UsageError("--dry-run and --confirm exclude each other", hint="omit one")
    plan = plan_job(Path(path), wanted, job, on_event)
    if not job.confirm:
        return plan
    on_event({"event": "job_planned", **plan.to_dict()})
    return submit(plan, on_event, on_log)
