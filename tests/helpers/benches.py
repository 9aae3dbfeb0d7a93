"""Reports of benchmarks and evaluations, as ``aoconvert`` writes them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.bench import Bench, BenchRow
from aoconvert.checkpoint.evaluation import Evaluation

ROW: dict[str, Any] = {
    "model": "result",
    "scheme": "int8wo",
    "fused": False,
    "compile": False,
    "offload": None,
    "batch_size": 1,
    "model_bytes": 1_500_000,
    "peak_bytes": 400_000_000,
    "seconds": 0.25,
    "seconds_min": 0.125,
    "seconds_max": 0.5,
    "runs": 3,
    "unit": "sentence",
    "per_second": 4.0,
    "workload": "8 tokens",
}
NOTHING = {"seconds": None, "seconds_min": None, "seconds_max": None, "per_second": None, "runs": 0}


def write_bench(folder: Path, *changes: dict[str, Any], **facts: Any) -> Bench:
    """A report of the checkpoint in the folder, with a row for each of the changes to ``ROW``."""
    values: dict[str, Any] = {
        "schema_version": 1,
        "path": "out",
        "source": None,
        "environment": {
            "device": "cpu",
            "device_name": "A CPU",
            "threads": "2",
            "peak": "resident set",
            "torch": "9.9",
        },
        "rows": [BenchRow.model_validate({**ROW, **change}) for change in changes or ({},)],
        "complete": True,
        "command": "aoconvert bench out --device cpu --runs 3 --tokens 8",
        "date": "2026-11-30T12:00:00+00:00",
        "manifest_sha256": hashlib.sha256((folder / "aoconvert.json").read_bytes()).hexdigest(),
        **facts,
    }
    report = Bench.model_validate(values)
    (folder / "aoconvert.bench.json").write_text(report.dump())
    return report


def write_eval(folder: Path, data: str = "0" * 64, **metrics: float) -> None:
    """An evaluation of the checkpoint in the folder, with these figures."""
    values: dict[str, Any] = {
        "schema_version": 1,
        "ok": True,
        "path": "out",
        "source": {"label": "source"},
        "environment": {},
        "data": {"kind": "text", "sha256": data, "samples": 1, "tokens": 8, "detail": "a text", "seed": 1},
        "components": [
            {"name": "", "class_name": "X", "task": "causal-lm", "metrics": metrics, "noise_floor": {}, "layers": []}
        ],
        "gates": [],
        "reused": 0,
        "command": "aoconvert eval out",
        "date": "2026-11-30T12:00:00+00:00",
        "manifest_sha256": hashlib.sha256((folder / "aoconvert.json").read_bytes()).hexdigest(),
    }
    (folder / "aoconvert.eval.json").write_text(Evaluation.model_validate(values).dump())
