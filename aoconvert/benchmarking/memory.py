"""Whether a model fits into the memory, by numbers, before a process is started for it."""

from __future__ import annotations

from aoconvert import accelerators
from aoconvert.benchmarking.job import Job
from aoconvert.benchmarking.rows import Wanted
from aoconvert.errors import PlanError
from aoconvert.humanize import size
from aoconvert.memory import available_bytes

_WEIGHTS = (".bin", ".safetensors")
_ITEM_BYTES = {"float32": 4}  # all other dtypes of models have 2


def require_room(job: Job) -> None:
    """Refuse where the result fits nowhere.

    Raises:
        PlanError: it needs more memory than there is.
    """
    lacking = _lack(_result_bytes(job), job.device)
    if lacking is None or (job.options.offload and _lack(_result_bytes(job), "cpu") is None):
        return
    raise PlanError([f"{job.label}: {lacking}"], hint="close other programs, or use a machine with more memory")


def shortage(job: Job, wanted: Wanted) -> str | None:
    """Why a row cannot be measured here for want of memory; ``None`` where its weights fit."""
    needed = _result_bytes(job) if wanted.model == "result" else _source_bytes(job)
    return _lack(needed, "cpu" if wanted.offload in ("model", "sequential") else job.device)


def _lack(needed: int, device: str) -> str | None:
    left = available_bytes() if device == "cpu" else accelerators.free_bytes(device)
    if needed <= left:
        return None
    return f"its weights need {size(needed)} of memory on {device}, and {size(left)} are free"


def _result_bytes(job: Job) -> int:
    """Of all weights files."""
    return sum(file.size for file in job.manifest.files() if file.path.endswith(_WEIGHTS))


def _source_bytes(job: Job) -> int:
    """Of the original in the dtype in which it runs; parts that are not quantized are as large in both."""
    quantized = [entry.totals for entry in job.manifest.components]
    written = sum(totals.bytes_out for totals in quantized)
    before = sum(totals.parameters for totals in quantized) * _ITEM_BYTES.get(job.dtype, 2)
    return max(0, _result_bytes(job) - written) + before
