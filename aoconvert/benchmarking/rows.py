"""Which rows a benchmark has: one for each measurement, mode and batch size, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aoconvert.benchmarking.job import Job
from aoconvert.checkpoint.bench import Offload, Which
from aoconvert.environment import import_diffusers

OFFLOADS: Sequence[Offload] = ("model", "sequential", "vae-tiling")
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_UNITS = {
    "step": "denoising step",
    "call": "call",
    "prefill": "prompt token",
    "decode": "generated token",
    "forward": "forward pass",
}


@dataclass(frozen=True)
class Wanted:
    """A row that is to be measured.

    Attributes:
        model: whose.
        measure: what is run, see ``children/workloads.py``.
        fuse: fuse the projections of the model first.
        fused: they are fused then, or were when it was quantized.
        compile, offload, batch_size: as in the row.
    """

    model: Which
    measure: str
    fuse: bool
    fused: bool
    compile: bool
    offload: Offload | None
    batch_size: int

    @property
    def unit(self) -> str:
        """What is counted, before the fresh process says more precisely."""
        return _UNITS[self.measure]

    def request(self, job: Job) -> dict[str, Any]:
        """What the fresh process is asked."""
        where = "cpu" if self.offload in ("model", "sequential") else job.device
        options = job.options
        return {
            "code": job.result_code(where) if self.model == "result" else job.source_code(where),
            "device": job.device,
            "part": job.measured,
            "folder": job.measured_folder,
            "measure": self.measure,
            "fuse": self.fuse,
            "compile": self.compile,
            "offload": self.offload,
            "batch_size": self.batch_size,
            "runs": options.runs,
            "tokens": options.tokens,
            "steps": options.steps,
            "size": list(options.width_and_height) if options.width_and_height is not None else None,
            "frames": options.frames,
        }


def list_rows(job: Job) -> list[Wanted]:
    """The rows of a benchmark: those of the result first."""
    models: list[Which] = ["result", "source"] if job.source is not None else ["result"]
    return [wanted for model in models for wanted in _rows_of(job, model)]


def _rows_of(job: Job, model: Which) -> Iterator[Wanted]:
    """Every measurement plain, fused and compiled; offload modes at the first batch size only."""
    fusing = _fusing(job, model)
    compiling = (False, True) if job.options.compile else (False,)
    for measure in _measures(job):
        for batch in job.options.batch_sizes:
            for fuse, fused in fusing:
                for compiled in compiling:
                    yield Wanted(model, measure, fuse, fused, compiled, None, batch)
        for mode in OFFLOADS if job.options.offload else ():
            if mode == "vae-tiling" and measure == "step":  # the VAE has no part in it
                continue
            yield Wanted(model, measure, *fusing[0], False, mode, job.options.batch_sizes[0])


def _fusing(job: Job, model: Which) -> list[tuple[bool, bool]]:
    """Whether to fuse, and whether it is fused then."""
    if model == "result" and job.target.fused:
        return [(False, True)]
    return [(False, False), (True, True)] if _offers_fusing(job) else [(False, False)]


def _offers_fusing(job: Job) -> bool:
    """Whether diffusers has a call for it; what it finds to fuse, it says when it is called."""
    component = job.layout.component(job.measured)
    if component is None or component.library != "diffusers":
        return False
    return hasattr(getattr(import_diffusers(), component.class_name, None), "fuse_qkv_projections")


def _measures(job: Job) -> list[str]:
    if job.target.kind == "pipeline":
        return ["step", "call"]
    return ["prefill", "decode"] if job.measured_class.endswith(_GENERATES) else ["forward"]
