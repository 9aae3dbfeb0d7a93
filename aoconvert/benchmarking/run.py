"""A benchmark: a fresh process for each row, and the report that grows by a row after each."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from aoconvert.benchmarking.job import Job, prepare
from aoconvert.benchmarking.memory import require_room, shortage
from aoconvert.benchmarking.rows import Wanted, list_rows
from aoconvert.checkpoint.bench import SCHEMA_VERSION, Bench, BenchRow
from aoconvert.checkpoint.manifest import BENCH_NAME
from aoconvert.environment import available_cores, device_facts, platform_name, versions
from aoconvert.errors import VerificationError
from aoconvert.files import write_whole
from aoconvert.options.bench import BenchOptions
from aoconvert.planning.overwriting import tidy
from aoconvert.progress import Progress
from aoconvert.sources import Source
from aoconvert.verification.limits import Limits
from aoconvert.verification.process import Children

_CHILDREN = Path(__file__).parent / "children"
_WEEK = 7 * 24 * 3600.0  # seconds: a slow machine may take long for a large model, and who waits can stop it
_LONGEST = 300  # characters of a library's reason
_NO_PIPELINE = "{} is not a pipeline, and only pipelines of diffusers have this offload mode"


def bench(
    folder: Path,
    label: str,
    options: BenchOptions,
    find_source: Callable[[], Source] | None,
    progress: Progress,
    *,
    writes: bool = True,
) -> Bench:
    """Measure a checkpoint and, with a source, its original, and write ``aoconvert.bench.json`` beside its manifest.

    The file is written whole after each row: what is stopped leaves the rows that were measured. Another run measures
    everything anew.

    Args:
        folder, label: the checkpoint.
        options: what to measure.
        find_source: resolves the original; ``None``: it is not measured.
        progress: is told what happens.
        writes: whether the report is put into the folder.

    Raises:
        SourceError, VerificationError, PlanError, WriteError: as :func:`aoconvert.benchmarking.job.prepare`; no row
            of the result could fit into the memory.
    """
    tidy(folder)
    job = prepare(folder, label, options, find_source, progress)
    require_room(job)
    wanted = list_rows(job)
    report = _begin(job)
    progress.start("rows", 0)
    with Children(_limits(), _CHILDREN) as children:
        for index, one in enumerate(wanted):
            row, facts = _measure(job, one, children)
            report = report.model_copy(
                update={
                    "rows": (*report.rows, row),
                    "environment": {**report.environment, **facts},
                    "complete": index + 1 == len(wanted),
                }
            )
            if writes:
                report = report.model_copy(update={"unwritten": _write(folder, report)})
            progress.advance(0, f"{index + 1} of {len(wanted)}: {row.model}, {row.unit}")
    progress.finish()
    return report


def _limits() -> Limits:
    limits = Limits.read()
    return limits if limits.seconds is not None else replace(limits, seconds=_WEEK)


def _begin(job: Job) -> Bench:
    facts = device_facts(job.device)
    on_cpu = facts.type == "cpu"
    peak = "resident set of the process, interpreter and libraries included" if on_cpu else "tensors on the device"
    environment = {
        "device": job.device,
        "device_name": facts.name,
        "platform": platform_name(),
        "cores": str(available_cores()),
        "dtype": job.dtype,
        "peak": peak,
        **versions(),
    }
    source = job.source
    return Bench(
        schema_version=SCHEMA_VERSION,
        path=job.label,
        source=(source.repo_id or Path(source.label).name) if source is not None else None,
        environment=environment,
        rows=(),
        complete=False,
        command=job.command(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        manifest_sha256=job.manifest_sha256,
    )


def _measure(job: Job, wanted: Wanted, children: Children) -> tuple[BenchRow, dict[str, str]]:
    """One row, and what it says of the environment."""
    found: dict[str, Any] = {}
    if wanted.offload is not None and job.target.kind != "pipeline":
        found["error"] = _NO_PIPELINE.format(job.target.class_name)
    elif (lacking := shortage(job, wanted)) is not None:
        found["error"] = lacking
    else:
        for answer in _ask(job, wanted, children):
            found |= answer
    threads = found.pop("threads", None)
    if "error" in found:
        found["error"] = found["error"][:_LONGEST]
    row = BenchRow.model_validate(
        {
            "model": wanted.model,
            "scheme": job.scheme if wanted.model == "result" else job.dtype,
            "fused": wanted.fused,
            "compile": wanted.compile,
            "offload": wanted.offload,
            "batch_size": wanted.batch_size,
            "runs": job.options.runs if "error" not in found else 0,
            "unit": wanted.unit,
            **found,
        }
    )
    return row, {"threads": str(threads)} if threads is not None else {}


def _ask(job: Job, wanted: Wanted, children: Children) -> Iterator[dict[str, Any]]:
    try:
        yield from children.ask("bench_child", wanted.request(job))
    except VerificationError as error:  # it died, or was ended
        yield {"error": error.message}


def _write(folder: Path, report: Bench) -> str | None:
    """Put the report beside the manifest; why that cannot be."""
    try:
        write_whole(folder / BENCH_NAME, report.dump().encode())
    except OSError as error:
        return f"{BENCH_NAME} is not written: {error.strerror}"
    return None
