"""A rewriting that was stopped goes on, or starts again, to the same bytes; nothing half-written appears."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import build_llama

import aoconvert
from aoconvert.errors import Interrupted
from aoconvert.progress import Silent

HERE = Path(__file__).parent
OLD = HERE.parent / "fixtures/legacy/diffusers-0.33.1-torchao-0.10.0/int8dq"


class StopAfter(Silent):
    """Counts the tensors that are made; Ctrl-C after some."""

    def __init__(self, count: int | None = None) -> None:
        self.count, self.made, self.stage = count, 0, ""

    def start(self, stage: str, total_bytes: int) -> None:
        self.stage = stage

    def advance(self, nbytes: int, current: str = "") -> None:
        if self.stage in ("migrate", "convert"):
            self.made += 1
            if self.made == self.count:
                raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    values = json.loads(found["aoconvert.json"])
    values.pop("run")
    return {**found, "aoconvert.json": values}


def test_a_stopped_migration_goes_on(tmp_path: Path) -> None:
    progress = StopAfter()
    whole = aoconvert.migrate(OLD, output=tmp_path / "whole", progress=progress)
    assert len(whole.deviations) == 16
    with pytest.raises(Interrupted, match=f"12 of {progress.made} tensors are kept"):
        aoconvert.migrate(OLD, output=tmp_path / "out", progress=StopAfter(12))
    assert not (tmp_path / "out").exists()
    again = StopAfter()
    done = aoconvert.migrate(OLD, output=tmp_path / "out", progress=again)
    assert again.made == progress.made - 12
    assert contents(done.output) == contents(whole.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_an_old_run_is_not_used_where_another_was_asked_for(tmp_path: Path) -> None:
    for options in ({"packed_on": "avx2"}, {"resume": False}):
        with pytest.raises(Interrupted):
            aoconvert.migrate(OLD, output=tmp_path / "out", progress=StopAfter(12), overwrite=True)
        again = StopAfter()
        done = aoconvert.migrate(OLD, output=tmp_path / "out", progress=again, overwrite=True, **options)
        assert again.made == 36
        used = ["the earlier run's work cannot be used: the plan changed"] if "packed_on" in options else []
        assert list(done.warnings) == used


def test_killed(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", hidden_size=128, intermediate_size=320, vocab_size=64)
    aoconvert.quantize(source, "int8wo", output=tmp_path / "bin", device="cpu", max_shard_size="150KB")
    tasks = [
        {"verb": "migrate", "source": str(OLD), "options": {}, "after": [5, 10]},
        {"verb": "convert", "source": str(tmp_path / "bin"), "options": {"format": "safetensors"}, "after": [5, 16]},
    ]
    for task in tasks:
        task["folder"] = str(tmp_path / str(task["verb"]))
        (tmp_path / str(task["verb"])).mkdir()
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", json.dumps(tasks)],
        capture_output=True,
        text=True,
        check=False,
        # a fork has none of the threads that torch believes in, and would wait for them for ever
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for task, report in zip(tasks, json.loads(done.stdout), strict=True):
        assert (report["appeared"], report["same"], report["left"]) == (False, True, ["out"]), task
        kept = sum(map(int, task["after"])) if task["verb"] == "migrate" else 0
        assert report["made"] == report["whole"] - kept
