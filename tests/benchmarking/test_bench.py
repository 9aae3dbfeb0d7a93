"""A benchmark: a row for each measurement, whatever cannot run is a row with the reason, and the report is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import build_llama
from helpers.documents import check_document
from helpers.shared import build_once

import aoconvert
from aoconvert.benchmarking import memory
from aoconvert.benchmarking.job import Job, prepare
from aoconvert.benchmarking.rows import list_rows
from aoconvert.checkpoint.bench import bench_of
from aoconvert.errors import PlanError, SourceError, UsageError
from aoconvert.options.bench import BenchOptions
from aoconvert.progress import Silent
from aoconvert.sources.folder import FolderSource

Call = Callable[..., Any]


@pytest.fixture
def small(llama: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A quantized Llama of its own."""

    def build(folder: Path) -> None:
        aoconvert.quantize(llama, "int8wo", output=folder, device="cpu", min_quantized=0)

    made = build_once(tmp_path_factory, "bench/llama-int8wo", build)
    return shutil.copytree(made, tmp_path / "out")


def job_of(folder: Path, source: Path | None = None, **options: Any) -> Job:
    found = (lambda: FolderSource(source)) if source is not None else None
    return prepare(folder, "out", BenchOptions(**options), found, Silent())


def inner_bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(inner_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def test_a_language_model(call: Call, small: Path) -> None:
    done = call("bench", small, "--runs", 2, "--tokens", 4, "--batch-size", 2, "--json")
    assert (done.code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    check_document("bench", found)
    prefill, decode = found["rows"]
    assert (prefill["unit"], decode["unit"]) == ("prompt token", "generated token")
    model = aoconvert.load(small)
    weights = {id(tensor): inner_bytes(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for row in found["rows"]:
        assert row["error"] is None
        assert (row["model"], row["scheme"], row["batch_size"], row["runs"]) == ("result", "int8wo", 2, 2)
        assert row["model_bytes"] == sum(weights.values())
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["per_second"] == pytest.approx(2 * 4 / row["seconds"])
        assert row["peak_bytes"] > row["model_bytes"]  # the interpreter is in it
        assert row["compile_seconds"] is None
    written = json.loads((small / "aoconvert.bench.json").read_text())
    assert written == found
    assert found["complete"] is True
    assert found["manifest_sha256"] == hashlib.sha256((small / "aoconvert.json").read_bytes()).hexdigest()
    assert found["command"] == "aoconvert bench out --device cpu --batch-size 2 --runs 2 --tokens 4"
    assert int(found["environment"]["threads"]) >= 1
    assert "resident" in found["environment"]["peak"]
    report = bench_of(small)
    assert report is not None and report.to_dict() == found
    assert aoconvert.verify(small, reload=False).ok  # the report beside the manifest is none of its business


def test_the_report_of_a_repo_is_not_put_into_the_cache(small: Path, tmp_path: Path) -> None:
    """A repo in the Hub's cache, as the Hub client lays it out."""
    repo, commit = tmp_path / "cache" / "models--user--tiny", "1" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = Path(shutil.copytree(small, repo / "snapshots" / commit))
    before = sorted(snapshot.rglob("*"))
    report = aoconvert.bench("user/tiny", cache_dir=tmp_path / "cache", local_files_only=True, runs=1, tokens=2)
    assert report.ok and report.unwritten is None and report.path == "user/tiny"
    assert sorted(snapshot.rglob("*")) == before


def test_a_report_of_another_conversion_does_not_count(small: Path) -> None:
    (small / "aoconvert.bench.json").write_text("{}")
    assert bench_of(small) is None


def test_rows_of_a_language_model(llama: Path, small: Path) -> None:
    job = job_of(small, llama, compile=True, batch_size=(1, 8, 1), offload=True)
    rows = [(row.model, row.measure, row.compile, row.offload, row.batch_size) for row in list_rows(job)]
    expected = [
        (model, measure, compiled, offload, batch)
        for model in ("result", "source")
        for measure in ("prefill", "decode")
        for compiled, offload, batch in [
            *((compiled, None, batch) for batch in (1, 8) for compiled in (False, True)),
            *((False, mode, 1) for mode in ("model", "sequential", "vae-tiling")),
        ]
    ]
    assert rows == expected
    assert job.command().startswith(f"aoconvert bench out --source {llama.name} --device cpu --compile --offload")


def test_what_no_mode_can_do_is_a_row_with_the_reason(call: Call, tmp_path: Path) -> None:
    """More tokens than there are positions, and modes that are for pipelines only."""
    config = tiny.transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    tiny.transformers.BertModel(config).bfloat16().save_pretrained(tmp_path / "bert")
    aoconvert.quantize(tmp_path / "bert", "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    done = call("bench", tmp_path / "out", "--offload", "--tokens", 17, "--json")
    assert done.code == 1
    rows = json.loads(done.stdout)["rows"]
    assert [row["offload"] for row in rows] == [None, "model", "sequential", "vae-tiling"]
    assert [row["runs"] for row in rows] == [0, 0, 0, 0]
    assert "17" in rows[0]["error"]
    assert all("is not a pipeline" in row["error"] for row in rows[1:])
    assert rows[0]["model_bytes"] > 0
    human = call("bench", tmp_path / "out", "--tokens", 16, "--runs", 1)
    assert human.code == 0
    assert "sentence (16 tokens)" in human.stdout
    assert "measured:" in human.stdout


class _Stops(Silent):
    """Ctrl-C after the first row."""

    def advance(self, nbytes: int, current: str = "") -> None:
        if current.startswith("1 of 2"):
            raise KeyboardInterrupt


def test_a_run_that_is_stopped_leaves_its_rows(small: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        aoconvert.bench(small, runs=1, tokens=2, progress=_Stops())
    report = bench_of(small)
    assert report is not None
    assert (len(report.rows), report.complete, report.ok) == (1, False, True)


def test_a_model_that_does_not_fit_is_refused_by_numbers(
    llama: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source alone is a row; the result is refused before anything is started."""
    room = sum(file.stat().st_size for file in small.glob("*.bin"))
    monkeypatch.setattr(memory, "available_bytes", lambda: room)
    job = job_of(small, llama)
    memory.require_room(job)
    result, _, source, _ = list_rows(job)
    assert memory.shortage(job, result) is None
    lacking = memory.shortage(job, source)
    assert lacking is not None and "are free" in lacking
    monkeypatch.setattr(memory, "available_bytes", lambda: room - 1)
    with pytest.raises(PlanError, match=r"its weights need .* of memory on cpu, and .* are free"):
        aoconvert.bench(small)
    assert not (small / "aoconvert.bench.json").exists()


def test_bad_input(call: Call, llama: Path, small: Path, tmp_path: Path) -> None:
    other = build_llama(tmp_path / "other", intermediate_size=96)
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[int, str, tuple[object, ...]]] = [
        (2, "batch-size", (small, "--batch-size", 0)),
        (2, "is not WIDTHxHEIGHT", (small, "--size", "64")),
        (2, "--source", (small, "--source", tmp_path / "absent")),
        (3, "is another model: its intermediate_size is 96", (small, "--source", other)),
        (3, "aoconvert.json", (tmp_path / "empty",)),
        (3, "aoconvert.json", (llama,)),
        (2, "one device", (small, "--device", "cuda:all")),
    ]
    for code, message, arguments in wrong:
        done = call("bench", *arguments)
        assert done.code == code, (arguments, done)
        assert message in done.stderr, (arguments, done)
        assert "Traceback" not in done.stderr
        assert not (small / "aoconvert.bench.json").exists()
    (small / "config.json").write_text("{}")
    damaged = call("bench", small)
    assert (damaged.code, damaged.stdout) == (3, "")


def test_numbers_of_python_are_checked(small: Path) -> None:
    with pytest.raises(UsageError, match="--batch-size 0 is not a positive number"):
        aoconvert.bench(small, batch_size=0)
    with pytest.raises(SourceError):
        aoconvert.bench(small / "nothing")


def test_a_pipeline_with_its_original(pipeline: Path, tmp_path: Path) -> None:
    """The denoiser is what is fused; torchao's int8 tensors cannot be, and the library says so."""
    out = tmp_path / "out"
    aoconvert.quantize(pipeline, "int8wo", output=out, device="cpu", min_quantized=0)
    job = job_of(out, pipeline)
    rows = list_rows(job)
    assert [(row.model, row.measure, row.fused) for row in rows] == [
        (model, measure, fused)
        for model in ("result", "source")
        for measure in ("step", "call")
        for fused in (False, True)
    ]
    assert job.measured == "transformer"
    names: dict[str, Any] = {}
    exec(job.source_code("cpu"), names)
    assert names["pipe"].transformer.dtype is torch.bfloat16
