"""Variants made on a Ray cluster of this machine: the same files, also where a worker is killed in the middle."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.releases import contents, make, steps_of, timeless, write_release

from aoconvert.errors import Interrupted, PlanError, UsageError
from aoconvert.releasing import release
from aoconvert.releasing.engines import ray as engine

needs_ray = pytest.mark.skipif(engine.version_of("ray") is None, reason="Ray is not installed: aoconvert[ray]")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_release(tmp_path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers at a time, for all tests here."""
    ray = pytest.importorskip("ray")
    before = dict(os.environ)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=80 << 20,
    )
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


def worker_of(variant: str) -> int:
    """Process of the worker that makes a variant."""
    found = [
        process.pid
        for process in psutil.process_iter(["cmdline", "username"])
        if f"ray::aoconvert {variant}" in " ".join(process.info["cmdline"] or [])
    ]
    [pid] = found
    return pid


def test_without_ray_or_with_a_gpu_by_number_it_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--address x:1 is a Ray cluster's"):
        make(file, "out", address="x:1")
    monkeypatch.setattr(engine, "version_of", lambda _: None)
    with pytest.raises(PlanError, match="Ray is not installed") as caught:
        make(file, "out", engine="ray")
    assert caught.value.hint == "pip install 'aoconvert[ray]'"
    assert not (file.parent / "out").exists()


@needs_ray
@pytest.mark.exhaustive
def test_variants_are_the_same_and_a_killed_worker_is_replaced(
    file: Path, cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    one, told = make(file, "one")
    killed = []

    def on_event(event: dict[str, Any]) -> None:
        told_by_ray.setdefault(event["variant"], []).append(event)
        if event["event"] == "quantized" and event["variant"] == "int8wo" and not killed:
            killed.append(worker_of("int8wo"))
            os.kill(killed[0], signal.SIGKILL)

    told_by_ray: dict[str, list[dict[str, Any]]] = {}
    two = release(file, on_event=on_event, engine="ray", skip_push=True, output_root=file.parent / "two")
    assert len(killed) == 1 and "int8wo: its worker died; another goes on" in caplog.text
    assert timeless(two.to_dict()) == timeless(one.to_dict()) and two.exit_code == 4
    assert contents(file.parent / "two") == contents(file.parent / "one")
    quantized = [event["again"] for event in told_by_ray["int8wo"] if event["event"] == "quantized"]
    assert quantized == [True, False]  # what was finished is not done again
    assert steps_of({"intx2wo": told_by_ray["intx2wo"]}) == steps_of({"intx2wo": told["intx2wo"]})


@needs_ray
@pytest.mark.exhaustive
def test_a_stop_ends_the_workers(file: Path, cluster: None) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "variant_started":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run the same command again"):
        release(file, on_event=stop, engine="ray", skip_push=True, output_root=file.parent / "out")
    record, _ = make(file, "out", engine="ray")
    assert record.exit_code == 4
