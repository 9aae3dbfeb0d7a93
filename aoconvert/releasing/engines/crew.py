"""Workers on this machine: processes that carry out tasks side by side."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aoconvert.errors import WorkerError
from aoconvert.releasing.engines.hearing import Left
from aoconvert.releasing.engines.task import Message, Task
from aoconvert.releasing.record import VariantRecord

_GRACE = 60  # seconds that a worker has to end after SIGTERM


def start_worker(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker that waits for its task; Ctrl-C goes to its parent alone."""
    words = [sys.executable, "-P", "-m", "aoconvert.releasing.engines"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(words, **pipes, env=environment, process_group=0)


@dataclass(frozen=True)
class Place:
    """Where a worker works.

    Attributes:
        cores: processors that it has to itself.
        environment: variables that name its GPU.
    """

    cores: tuple[int, ...]
    environment: dict[str, str] = field(default_factory=dict)


class Crew:
    """Workers, and the tasks that are left for them.

    Args:
        tasks: each is for one worker.
        places: one worker at a time is at each.
        start: a record of a variant, to say in it that it failed.
    """

    def __init__(self, tasks: Iterable[Task], places: Sequence[Place], start: dict[str, VariantRecord]) -> None:
        self._tasks = deque(tasks)
        self._start = start
        self._heard: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._over = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._threads = [
            threading.Thread(target=self._serve, args=item, name=f"aoconvert-worker-{item[0]}", daemon=True)
            for item in enumerate(places)
        ]

    def listen(self) -> Generator[tuple[int, Message | None]]:
        """Start; gives what the workers say, and ``None`` where one has ended, until all tasks are done."""
        for thread in self._threads:
            thread.start()
        left = len(self._threads)
        while left:
            place, message = self._heard.get()
            if message == {}:
                left -= 1
            else:
                yield place, message

    def stop(self) -> None:
        """End the workers that run, which keep what is finished, and start no more; a second Ctrl-C kills them."""
        with self._lock:
            self._over = True
            for worker in self._running:
                _signal(worker, signal.SIGTERM)
        try:
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join(_GRACE)
        finally:
            with self._lock:
                for worker in self._running:
                    _signal(worker, signal.SIGKILL)

    def _serve(self, number: int, place: Place) -> None:
        """Start a worker for one task after the other."""
        try:
            while (task := self._take()) is not None:
                self._carry_out(number, task.model_copy(update={"cores": place.cores}), place)
                self._heard.put((number, None))
        finally:
            self._heard.put((number, {}))

    def _take(self) -> Task | None:
        with self._lock:
            return self._tasks.popleft() if self._tasks and not self._over else None

    def _carry_out(self, number: int, task: Task, place: Place) -> None:
        left = Left(list(task.names))
        try:
            code = self._run(number, task, place, left)
            error = _died(code)
        except OSError as failed:  # no memory for another process
            error = WorkerError(f"no worker could be started: {failed.strerror or failed}", hint="use fewer --jobs")
        if self._over:
            return
        for message in left.give_up(error, self._start):
            self._heard.put((number, message))
        if left.names:
            with self._lock:
                self._tasks.append(task.model_copy(update={"names": tuple(left.names)}))

    def _run(self, number: int, task: Task, place: Place, left: Left) -> int:
        """Run a worker to its end; gives its exit code."""
        with self._lock:
            if self._over:
                return 0
            worker = start_worker({**os.environ, **place.environment})
            self._running.add(worker)
        try:
            assert worker.stdin is not None and worker.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once
                worker.stdin.write(task.model_dump_json().encode() + b"\n")
                worker.stdin.flush()
            for line in worker.stdout:
                with contextlib.suppress(ValueError):  # a line that its death cut short
                    message = json.loads(line)
                    if left.hear(message):
                        self._heard.put((number, message))
            return worker.wait()
        finally:
            with self._lock:
                self._running.discard(worker)
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()


def _died(code: int) -> WorkerError:
    """Say how a worker ended that did not say so itself."""
    if code == -signal.SIGKILL:
        hint = "the system kills what takes its last memory: use fewer --jobs; what is finished is kept"
        return WorkerError("its worker was killed (SIGKILL)", hint=hint)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return WorkerError(f"its worker died ({how})", hint="run the same command again: what is finished is kept")


def _signal(worker: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(OSError):
        worker.send_signal(number)
