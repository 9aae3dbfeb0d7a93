"""Reports of benchmarks, written as ``aoconvert bench`` writes them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.bench import Bench, BenchRow

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
