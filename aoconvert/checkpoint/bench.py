"""A benchmark as ``aoconvert.bench.json`` holds it: one model, written by bench, read by card and push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from aoconvert.checkpoint.files import belongs
from aoconvert.checkpoint.json_model import Date, JsonModel, read_json_model
from aoconvert.checkpoint.manifest import BENCH_NAME
from aoconvert.errors import AoconvertError
from aoconvert.json_text import CONFIG_BYTES

Which = Literal["result", "source"]
Offload = Literal["model", "sequential", "vae-tiling"]

SCHEMA_VERSION: Literal[1] = 1


class BenchRow(JsonModel):
    """What one fresh process measured. A figure is null where it was not reached; ``error`` says why."""

    model: Which
    scheme: str = Field(description="of the result; the dtype of the source")
    fused: bool = Field(description="query, key and value projections were fused")
    compile: bool = Field(description="torch.compile")
    offload: Offload | None = Field(
        description="model: enable_model_cpu_offload; sequential: enable_sequential_cpu_offload"
    )
    batch_size: int
    model_bytes: int | None = Field(
        None, description="of all parameters and buffers, inner tensors counted, what is shared counted once"
    )
    peak_bytes: int | None = Field(
        None,
        description="memory while it ran: tensors on the device, or on a CPU the process's resident set with the "
        "interpreter and its libraries; environment.peak says which",
    )
    seconds: float | None = Field(None, description="median time of one run")
    seconds_min: float | None = None
    seconds_max: float | None = None
    runs: int = Field(description="how many runs were timed")
    unit: str = Field(description="what is counted in per_second: denoising step, image, prompt token, sentence …")
    per_second: float | None = None
    compile_seconds: float | None = Field(
        None, description="how much longer the warm-up runs took than the median run; only with torch.compile"
    )
    error: str | None = None
    workload: str | None = Field(None, description="sizes of one run: steps, pixels, frames, tokens")

    @property
    def mode(self) -> str:
        """How it ran, in a few words."""
        modes = {"fused": self.fused, "compiled": self.compile, f"{self.offload} offload": self.offload}
        if self.offload == "vae-tiling":
            modes = {**modes, "vae-tiling offload": None, "VAE tiling": True}
        return ", ".join(name for name, on in modes.items() if on) or "plain"


class Bench(JsonModel):
    """A benchmark.

    Attributes:
        path: as the user named it.
        source: the original's repo, or the name of its folder; null where only the result was measured.
        environment: device, versions, threads, and what ``peak_bytes`` counts.
        rows: one fresh process each, in the order in which they ran.
        complete: false while rows are still to come: the run was stopped.
        command: what measures the same again.
        unwritten: why the report is not in the folder; ``None`` where it is. Never written.
    """

    schema_version: Literal[1]
    path: str
    source: str | None
    environment: dict[str, str]
    rows: tuple[BenchRow, ...]
    complete: bool
    command: str
    date: Date
    manifest_sha256: str
    unwritten: SkipJsonSchema[str | None] = Field(default=None, exclude=True)

    @property
    def ok(self) -> bool:
        """Whether at least one row of the result ran."""
        return any(row.model == "result" and row.error is None for row in self.rows)

    @property
    def exit_code(self) -> int:
        """What a command that measured exits with."""
        return 0 if self.ok else AoconvertError.exit_code

    def to_dict(self) -> dict[str, Any]:
        """Give what ``bench --json`` prints and ``aoconvert.bench.json`` holds; the keys are a contract."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """Write the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_bench(folder: Path) -> Bench:
    """Read the report in a folder, which anybody may have written.

    Raises:
        OSError: there is none (``FileNotFoundError``), or it cannot be read.
        ValueError: it is not a report of a benchmark.
    """
    return read_json_model(Bench, folder / BENCH_NAME, CONFIG_BYTES)


def bench_of(folder: Path) -> Bench | None:
    """Find the report in a folder that belongs to the manifest beside it."""
    try:
        return belongs(read_bench(folder), folder)
    except (OSError, ValueError):
        return None
