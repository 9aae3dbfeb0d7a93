"""Runs as a program: a worker, which carries out a task.

``python -m aoconvert.releasing.engines``: the task is the first line of stdin, which stays open: when it is closed,
whoever gave the task is gone, and the work stops as with SIGTERM. stdout has a line of JSON for each message, see
``aoconvert.releasing.engines.worker``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from types import FrameType

from aoconvert.releasing.engines.task import Message, Task
from aoconvert.releasing.engines.worker import run_task


class _Lines:
    """Writes messages to whoever gave the task; nothing else that is printed gets among them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)

    def __call__(self, message: Message) -> None:
        """Write a message."""
        line = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock:
            try:
                while line:
                    line = line[self._file.write(line) or 0 :]
            except OSError:
                _end()


def _end() -> None:
    """Stop like Ctrl-C does; what is finished stays."""
    os.kill(os.getpid(), signal.SIGTERM)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch_stdin() -> None:
    while os.read(0, 1):
        pass
    _end()


def main() -> None:
    """Carry out the task on stdin."""
    say = _Lines()
    task = Task.model_validate_json(sys.stdin.buffer.readline())
    signal.signal(signal.SIGTERM, _terminate)
    if task.cores:
        os.sched_setaffinity(0, task.cores)  # before torch is imported: it starts a thread for each
    threading.Thread(target=_watch_stdin, name="aoconvert-stdin", daemon=True).start()
    try:
        code = run_task(task, say)
    except KeyboardInterrupt:  # outside of the work
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
