"""Variants made side by side: the same files, and what goes wrong with one worker is no harm to the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.forking import WITH_LIBRARIES, Forked, Forker
from helpers.releases import TWO_SCHEMES, contents, make, steps_of, timeless, write_release

from aoconvert import accelerators
from aoconvert.cli.main import cli
from aoconvert.errors import Interrupted, PlanError, UsageError
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing import release
from aoconvert.releasing.engines import crew, local
from aoconvert.releasing.engines.task import Work, deal
from aoconvert.releasing.release_file import load
from aoconvert.releasing.variants import list_variants


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_release(tmp_path)


class Workers:
    """Forked workers; ``first`` runs in each before it begins."""

    def __init__(self, forker: Forker) -> None:
        self.started: list[Forked] = []
        self.first = ""
        self._forker = forker

    def start(self, environment: dict[str, str]) -> Forked:
        """In place of ``crew.start_worker``."""
        forking = self._forker.fork_children_of_verify()
        code = f"{forking}\n{self.first}\nfrom aoconvert.releasing.engines.__main__ import main\nmain()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.started.append(self._forker.popen(["-c", code], WITH_LIBRARIES, **pipes, env=environment))
        return self.started[-1]


@pytest.fixture
def workers(forker: Forker, monkeypatch: pytest.MonkeyPatch) -> Workers:
    found = Workers(forker)
    monkeypatch.setattr(crew, "start_worker", found.start)
    return found


def test_two_workers_write_the_same_as_one_process(file: Path, workers: Workers) -> None:
    one, told = make(file, "one")
    assert workers.started == []
    two, told_by_two = make(file, "two", jobs=2)
    assert len(workers.started) == 2 and all(worker.poll() == 0 for worker in workers.started)
    assert timeless(two.to_dict()) == timeless(one.to_dict()) and two.exit_code == 4
    assert contents(file.parent / "two") == contents(file.parent / "one")
    assert steps_of(told_by_two) == steps_of(told)
    assert any(event["event"] == "progress" for event in told_by_two["int8wo"])

    # what workers made is found again by this process, and by others
    for jobs in (1, 2):
        again, told = make(file, "two", jobs=jobs)
        assert again == two
        assert not any(event.get("again") for events in told.values() for event in events)


def test_a_worker_that_is_killed_fails_its_variant_alone(file: Path, workers: Workers) -> None:
    """Both variants are one worker's; the other has another model."""
    text = TWO_SCHEMES.replace('source = "model"\n', "")
    models = "".join(f'[[models]]\nsource = "model"\nname = "{name}"\n' for name in ("a", "b"))
    file.write_text(text.replace("[defaults]", f"{models}[defaults]").replace("min_sqnr_db = 20", "min_sqnr_db = 1"))
    workers.first = """
import os, signal
from aoconvert import api
def verify(folder, verify=api.verify, **options):
    if folder.name == "a-int8wo":
        os.kill(os.getpid(), signal.SIGKILL)
    return verify(folder, **options)
api.verify = verify
"""
    record, told = make(file, "out", jobs=2)
    status = {variant.name: variant.status for variant in record.variants}
    assert status == {"a-int8wo": "failed", "a-intx2wo": "made", "b-int8wo": "made", "b-intx2wo": "made"}
    error = record.variants[0].error
    assert error is not None and (error.type, error.exit_code) == ("WorkerError", 1)
    assert error.message == "its worker was killed (SIGKILL)" and "--jobs" in (error.hint or "")
    assert told["a-int8wo"][-1] == {"event": "failed", "variant": "a-int8wo", "error": error.model_dump()}
    assert record.exit_code == 1

    workers.first = ""
    record, told = make(file, "out", jobs=2)
    assert record.ok
    again = {name: [event["again"] for event in events if "again" in event] for name, events in told.items()}
    assert again.pop("a-int8wo") == [False, True]
    assert again == {name: [False, False] for name in again}


def test_what_a_worker_cannot_do_is_the_failure_of_its_variant(file: Path, workers: Workers) -> None:
    workers.first = """
from aoconvert import api
def verify(folder, verify=api.verify, **options):
    return verify(folder, **options) if folder.name == "int8wo" else {}["no such key"]
api.verify = verify
"""
    record, _ = make(file, "out", jobs=2)
    assert [variant.status for variant in record.variants] == ["made", "failed"]
    error = record.variants[1].error
    assert error is not None and error.message == "unexpected KeyError: 'no such key'"


def test_a_stop_ends_all_workers_and_keeps_what_is_done(file: Path, workers: Workers) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "quantized":
            raise KeyboardInterrupt

    options: dict[str, Any] = {"skip_push": True, "output_root": file.parent / "out", "jobs": 2}
    with pytest.raises(Interrupted, match="run the same command again"):
        release(file, on_event=stop, **options)
    assert len(workers.started) == 2
    assert all(worker.poll() in (0, 130) for worker in workers.started)
    record, told = make(file, "out", jobs=2)
    assert record.exit_code == 4
    assert False in [event["again"] for events in told.values() for event in events if event["event"] == "quantized"]


def test_a_worker_stops_when_nobody_gives_it_work_any_more(file: Path, workers: Workers) -> None:
    """Its parent was killed: what it had was a pipe."""
    found = load(file)
    options = ReleaseOptions(skip_push=True, output_root=file.parent / "out")
    task = Work(file, found, options).task(list_variants(file, found, options))
    workers.first = """
import threading
from aoconvert import api
api.verify = lambda *_, **__: threading.Event().wait()
"""
    worker = workers.start(dict(crew.os.environ))
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(task.model_dump_json().encode() + b"\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if json.loads(line).get("event", {}).get("event") == "quantized":
            break
    worker.stdin.close()
    assert worker.wait() == 130
    worker.stdout.close()


def test_more_workers_than_memory_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "available_bytes", lambda: 600 * 10**6)
    with pytest.raises(PlanError, match=r"--jobs 2: 2 workers need up to \S+ \S+ of memory") as caught:
        make(file, "out", jobs=2)
    assert caught.value.hint == "--jobs 1, or close other programs"
    assert not (file.parent / "out").exists()
    assert local.choose_jobs([], 7) == 1


def test_variants_of_one_source_stay_together_where_that_keeps_all_workers_busy(file: Path) -> None:
    variants = "".join(f'[[variants]]\nscheme = "int8wo"\nname = "v{number}"\n' for number in range(4))
    models = "".join(f'[[models]]\nsource = "{name}"\n' for name in ("a", "b"))
    file.write_text(f'name = "x"\n{models}{variants}')
    every = list_variants(file, load(file), ReleaseOptions())
    for jobs in range(1, 10):
        hands = deal(every, jobs)
        assert sorted(each.name for hand in hands for each in hand) == sorted(each.name for each in every)
        assert all(len({each.source for each in hand}) == 1 for hand in hands)
        assert len(hands) == max(2, min(jobs, len(every)))
        assert max(map(len, hands)) - min(map(len, hands)) <= max(map(len, hands)) // 2


def test_each_worker_has_a_gpu_and_processors_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew.os, "sched_getaffinity", lambda _: set(range(2, 7)))
    monkeypatch.setattr(accelerators, "count", lambda kind: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = local.places(3, "cuda")
    assert [place.cores for place in found] == [(2,), (3, 4), (5, 6)]
    assert [place.environment for place in found] == [{"CUDA_VISIBLE_DEVICES": text} for text in "010"]
    assert [place.cores for place in local.places(7, None)] == [(2,), (3,), (4,), (5,), (6,), (2,), (3,)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7")
    assert accelerators.show_one("cuda", 1) == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    assert accelerators.show_one("xpu", 1) == {"ZE_AFFINITY_MASK": "1"}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--address", "x:1"], "--address x:1 is a Ray cluster's"),
        (["--engine", "ray", "--flavor", "cpu-xl"], "--flavor is for a job"),
        (["--engine", "hf-jobs", "--jobs", "2"], "--jobs: the job makes a variant on each GPU"),
        (["--engine", "hf-jobs", "--address", "x:1"], "--address is a Ray cluster's"),
    ],
)
def test_an_option_goes_with_its_engine(file: Path, words: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        cli.main(["release", str(file), *words], standalone_mode=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [2, 9, 15])
def test_a_signal_to_the_command_leaves_nothing_running(file: Path, number: int) -> None:
    words = [sys.executable, "-m", "aoconvert", "release", str(file), "--skip-push", "--jobs", "2", "--json"]
    words += ["--output-root", str(file.parent / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None and command.stderr is not None
        first = next(line for line in command.stdout if '"variant_started"' in line)
        below = psutil.Process(command.pid).children(recursive=True)
        assert len(below) == 2, first
        command.send_signal(number)
        last = command.stdout.read().splitlines()
    assert command.returncode == (-9 if number == 9 else 130)
    assert number == 9 or json.loads(last[-1])["error"]["type"] == "Interrupted"
    assert psutil.wait_procs(below, timeout=60)[1] == []
