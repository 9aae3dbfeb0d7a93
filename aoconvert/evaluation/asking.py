"""A model runs in a fresh interpreter, and says line by line what it has done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from aoconvert.errors import AoconvertError, PlanError, SourceError, UsageError, VerificationError
from aoconvert.evaluation.job import Job
from aoconvert.verification.limits import Limits
from aoconvert.verification.process import Children


def read_limits() -> Limits:
    """As the environment says; there is no limit of time where it says none, as the progress shows what is done."""
    found = Limits.read()
    return found if found.seconds is not None else replace(found, seconds=math.inf)


def ask(
    job: Job,
    stage: str,
    running: Children,
    request: dict[str, Any],
    nbytes: int,
    passes: int,
    keep: Callable[[Mapping[str, Any]], None] | None = None,
    *,
    program: str = "eval_child",
) -> list[dict[str, Any]]:
    """Run a model in a fresh interpreter; the progress counts the weights that each pass reads.

    Args:
        job: what is evaluated.
        stage: what the progress calls it.
        running: starts the interpreter.
        request: of the program.
        nbytes: of the model.
        passes: how many samples it runs.
        keep: is given the line of each sample as it comes.
        program: in ``children``.

    Raises:
        AoconvertError: what the program says is wrong.
    """

    def notice(line: Mapping[str, Any]) -> None:
        if "sample" in line:
            job.progress.advance(nbytes, f"sample {line['sample'] + 1}")
            if keep is not None:
                keep(line)

    job.progress.start(stage, nbytes * max(passes, 1))
    answers = running.ask(program, request, nbytes=nbytes, notice=notice)
    job.progress.finish()
    last = answers[-1]
    if "error" in last:
        raise _error(last)
    return answers


def _error(line: Mapping[str, Any]) -> AoconvertError:
    message, hint = str(line["error"]), line.get("hint")
    if line["kind"] == "data":
        return UsageError(message, hint=hint)
    if line["kind"] == "memory":
        return PlanError([message])
    if line["kind"] == "original":
        return SourceError(message, hint=hint)
    return VerificationError(message, hint=hint or "run aoconvert verify")
