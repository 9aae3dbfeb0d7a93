"""Starts a planned job, passes on what it says, and tells how it ended."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from aoconvert.errors import (
    AoconvertError,
    HubError,
    Interrupted,
    PlanError,
    UsageError,
    VerificationError,
)
from aoconvert.releasing.engines.hf_jobs.lines import DocumentReader
from aoconvert.releasing.engines.hf_jobs.plan import COMMAND, JobPlan, python_version
from aoconvert.releasing.record import Record
from aoconvert.releasing.told import OnEvent
from aoconvert.sources.hub_errors import LOGIN_HINT, failed_status, translate_errors, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi, JobInfo

OnLog = Callable[[str], None]

_POLL_SECONDS = 2.0  # as the Hub's own command
_ERRORS: dict[int, type[AoconvertError]] = {2: UsageError, 4: VerificationError, 5: HubError}
_AGAIN = "the same command goes on from the bucket"
_TIME_IS_UP = re.compile(r"time[d]?[ -]?out|deadline", re.IGNORECASE)
_EXIT_CODE = re.compile(r"exit code:? *(\d{1,3})", re.IGNORECASE)


@dataclass
class _Said:
    """The last document of the attempt that ran last; a new attempt begins anew."""

    summary: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    attempts: int = field(default=0)


def submit(plan: JobPlan, on_event: OnEvent, on_log: OnLog) -> Record:
    """Start a job, or find the one that runs already, and follow it to its end.

    Args:
        plan: the job.
        on_event: is told what the release in the job tells.
        on_log: gets every other line of the job's log.

    Returns:
        The record that the job gave.

    Raises:
        PlanError: a job with another order works on the same release.
        HubError: the Hub refused, or cannot be asked any more while the job goes on.
        Interrupted: Ctrl-C ends the following, not the job.
        AoconvertError: what the job failed of, with its exit code.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=plan.token)
    if plan.running is not None and not plan.running.same:
        raise PlanError(
            [f"the job {plan.running.id} works on {plan.bucket}/{Path(plan.order.path).stem}, with another order"],
            hint=f"wait until it has ended, or cancel it: {cancel_command(plan, plan.running.id)}",
        )
    try:
        job_id, url = (plan.running.id, plan.running.url) if plan.running is not None else _start(api, plan)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted while the job was started: it may run, and cost money",
            hint=f"hf jobs ps --namespace {plan.namespace} lists it; the same command follows it",
        ) from None
    started = {"job_id": job_id, "url": url, "namespace": plan.namespace, "again": plan.running is None}
    on_event({"event": "job_submitted", **started})
    try:
        said = _wait_and_follow(api, plan, job_id, on_event, on_log)
        with translate_errors(f"the job {job_id}", None):
            ended = api.wait_for_job(job_id, namespace=plan.namespace, poll_interval=_POLL_SECONDS)
    except KeyboardInterrupt:
        raise Interrupted(
            f"no longer following the job {job_id}, which goes on and costs money until it ends: {url}",
            hint=f"the same command follows it again; to stop it: {cancel_command(plan, job_id)}",
        ) from None
    except HubError as error:
        raise HubError(
            f"{error.message}; the job {job_id} may go on, and cost money: {url}",
            hint=f"the same command follows it again; to stop it: {cancel_command(plan, job_id)}",
            retryable=True,
        ) from error
    return conclude(plan, ended, said)


def cancel_command(plan: JobPlan, job_id: str) -> str:
    """What stops a job."""
    return f"hf jobs cancel {plan.namespace}/{job_id}"


def _start(api: HfApi, plan: JobPlan) -> tuple[str, str]:
    """Make the bucket where it is not there, and start the job."""
    from huggingface_hub import Volume

    if found := [word for word in COMMAND if Path(word).is_file()]:
        raise UsageError(
            f"the Hub client would send the file {found[0]} of this folder along as part of the command",
            hint="run this in another folder",
        )
    with translate_errors(f"the bucket {plan.bucket}", None, doing="write"):
        api.create_bucket(plan.bucket, private=True, exist_ok=True)
    try:
        with translate_errors("Hugging Face Jobs", None, doing="write"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*run_uv_job' is experimental")  # a test holds the request
            job = api.run_uv_job(
                COMMAND[0],
                script_args=list(COMMAND[1:]),
                dependencies=list(plan.dependencies),
                python=python_version(),
                env=plan.environment,
                secrets={"HF_TOKEN": plan.token},
                flavor=plan.flavor.name,
                timeout=plan.timeout,
                attempts=plan.attempts,
                name=plan.name,
                labels=plan.labels,
                volumes=[Volume(**volume) for volume in plan.volumes],
                namespace=plan.namespace,
            )
    except HubError as error:
        raise _not_started(error, plan) from error
    return job.id, job.url


def _not_started(error: HubError, plan: JobPlan) -> HubError:
    status = failed_status(error.__cause__)
    if status == 402:
        return HubError(
            f"{plan.namespace} has no credit for jobs (402)", hint="add some at https://huggingface.co/settings/billing"
        )
    if status in (401, 403):
        return HubError(
            f"this token may not start jobs for {plan.namespace} ({status})",
            hint=f"let it start and manage jobs (https://huggingface.co/settings/tokens), or {LOGIN_HINT}",
        )
    if status is not None and status < 500:
        return HubError(f"{error.message}; no job was started", hint="the Hub refused it: nothing was spent")
    return HubError(
        f"{error.message}; the job may have been started, and cost money",
        hint=f"hf jobs ps --namespace {plan.namespace} lists it; the same command follows it, or starts it",
        retryable=True,
    )


def _wait_and_follow(api: HfApi, plan: JobPlan, job_id: str, on_event: OnEvent, on_log: OnLog) -> _Said:
    """Follow a job once it has a machine; before that there is no log, and never one if it fails of that."""
    from huggingface_hub import JobStage

    running = [JobStage.RUNNING]
    with translate_errors(f"the job {job_id}", None):
        job = api.wait_for_job(job_id, namespace=plan.namespace, poll_interval=_POLL_SECONDS, stages=running)
    try:
        return _follow(api, plan, job_id, on_event, on_log)
    except HubError:
        if job.status.stage in running:
            raise
        return _Said()


def _follow(api: HfApi, plan: JobPlan, job_id: str, on_event: OnEvent, on_log: OnLog) -> _Said:
    said, reader = _Said(), DocumentReader()
    for line in _read_log(api, plan, job_id):
        document = reader.take(line)
        if document is None:
            on_log(without_secrets(line))
        elif "error" in document and "event" not in document:
            said.error = document["error"]
        elif document.get("event") == "summary":
            said.summary = document
        elif document.get("event") == "job_started":
            said = _Said(attempts=said.attempts + 1)
            on_event({"event": "job_started", "attempt": said.attempts})
        elif document:
            on_event(document)
    return said


def _read_log(api: HfApi, plan: JobPlan, job_id: str) -> Iterator[str]:
    """The job's log, line by line, until it has ended; only calls to the client have its errors translated."""
    with translate_errors(f"the log of the job {job_id}", None):
        lines = iter(api.fetch_job_logs(job_id=job_id, namespace=plan.namespace, follow=True))
    while True:
        with translate_errors(f"the log of the job {job_id}", None):
            text = next(lines, None)
        if text is None:
            return
        yield from text.rstrip("\r\n").splitlines() or [""]


def conclude(plan: JobPlan, job: JobInfo, said: _Said) -> Record:
    """What a job that has ended made.

    Raises:
        AoconvertError: it failed before it could give a record.
    """
    if said.summary is not None:
        try:
            return Record.model_validate({key: value for key, value in said.summary.items() if key != "event"})
        except ValidationError as error:
            problem = f"the job {job.id} gave a record that this version cannot read"
            raise AoconvertError(problem, hint=f"its log: {job.url}") from error
    if said.error is not None and said.error.get("exit_code") != Interrupted.exit_code:
        raise _of_job(job, said.error)
    stage, message = str(getattr(job.status.stage, "value", job.status.stage)), job.status.message
    because = f": {without_secrets(message)}" if message else ""
    if stage == "COMPLETED":
        raise AoconvertError(f"the job {job.id} ended well, but gave no record", hint=f"its log: {job.url}")
    if stage in ("CANCELED", "DELETED") and not _is_out_of_time(plan, job):
        raise AoconvertError(f"the job {job.id} was cancelled{because}", hint=_AGAIN, retryable=True)
    if _is_out_of_time(plan, job):
        longer = f"{_AGAIN}, if a variant was made; --timeout gives it longer than {plan.timeout} s"
        raise AoconvertError(f"the job {job.id} was stopped: its time was up{because}", hint=longer, retryable=True)
    code = _EXIT_CODE.search(message or "")
    killed = code is not None and int(code[1]) == 137
    hint = f"{_AGAIN}; its log: {job.url}"
    if killed:
        hint = f"exit code 137 is often too little memory: try a larger --flavor; {hint}"
    raise AoconvertError(
        f"the job {job.id} was stopped before its end ({stage}){because}", hint=hint, retryable=not killed
    )


def _is_out_of_time(plan: JobPlan, job: JobInfo) -> bool:
    ran = job.durations.running_secs if job.durations is not None else None
    return bool(_TIME_IS_UP.search(job.status.message or "")) or (ran is not None and ran >= plan.timeout)


def _of_job(job: JobInfo, error: dict[str, Any]) -> AoconvertError:
    """The error that a job ended with, as if it were ours."""
    code, hint = error.get("exit_code"), error.get("hint")
    message = f"in the job {job.id}: {error.get('message')}"
    if code == PlanError.exit_code:
        problems = [str(line) for line in error.get("problems") or [error.get("message")]]
        return PlanError([f"in the job {job.id}: {line}" for line in problems], hint=hint)
    kind = _ERRORS.get(code, AoconvertError) if isinstance(code, int) else AoconvertError
    return kind(message, hint=hint, retryable=bool(error.get("retryable")))
