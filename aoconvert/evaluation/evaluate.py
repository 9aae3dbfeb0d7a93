"""Evaluation: look at both, run both, judge, and write ``aoconvert.eval.json``."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

from aoconvert.checkpoint.evaluation import SCHEMA_VERSION, Evaluation
from aoconvert.checkpoint.manifest import EVAL_NAME
from aoconvert.environment import device_facts, versions
from aoconvert.evaluation.gates import judge
from aoconvert.evaluation.job import Job, prepare
from aoconvert.evaluation.models import Measured, measure_model
from aoconvert.evaluation.pipelines import measure_pipeline
from aoconvert.files import write_whole
from aoconvert.options.evaluate import EvaluateOptions
from aoconvert.planning.overwriting import tidy
from aoconvert.progress import Progress
from aoconvert.sources import Source


def evaluate(
    folder: Path,
    label: str,
    options: EvaluateOptions,
    find_source: Callable[[], Source],
    progress: Progress,
    *,
    writes: bool = True,
) -> Evaluation:
    """Compare a checkpoint with its original, and write the report beside the manifest.

    Args:
        folder: the checkpoint.
        label: what the report calls it.
        options: what to compare on, and the gates.
        find_source: resolves the original.
        progress: is told what happens.
        writes: whether the report is put into the folder.

    Raises:
        AoconvertError: see ``api.evaluate``. Nothing is written then.
    """
    if writes:
        tidy(folder)
    job = prepare(folder, label, options, find_source, progress, writes=writes)
    found = _measure(job)
    gates = tuple(judge(options, found.components))
    device = job.device.partition(":")[0]
    report = Evaluation(
        schema_version=SCHEMA_VERSION,
        ok=all(gate.passed for gate in gates),
        path=label,
        source=job.described.model_copy(update={"dtype": found.dtype}),
        environment={**versions(), "device": device, "device_name": device_facts(device).name},
        data=found.data,
        components=found.components,
        gates=gates,
        reused=found.reused,
        peak_bytes=found.peak_bytes,
        command=job.command(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        manifest_sha256=job.manifest_sha256,
    )
    if not writes:
        return report
    try:
        write_whole(folder / EVAL_NAME, report.dump().encode())
    except OSError as error:
        return report.model_copy(update={"unwritten": f"{EVAL_NAME} is not written: {error.strerror}"})
    return report


def _measure(job: Job) -> Measured:
    if job.target.kind == "transformers":
        return measure_model(job)
    return measure_pipeline(job)
