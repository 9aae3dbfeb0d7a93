"""Fresh interpreters: what a user's machine would see, with nothing of aoconvert in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aoconvert.errors import VerificationError

_CHILDREN = Path(__file__).parent / "children"


class Children:
    """The interpreters that run side by side; those that still run at the end of the ``with`` block are ended."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End those that run, and start no more."""
        with self._lock:
            self._over = True
            for process in self._running:
                process.kill()

    def ask(
        self, child: str, request: dict[str, Any], *, environment: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Run a program of ``children`` with a request on stdin, and read its answer, one JSON value a line.

        The interpreter is isolated (``-I``: no ``PYTHON*`` variables, no current folder), and offline unless it is
        given another ``environment``. Threads may call this at the same time.

        Raises:
            VerificationError: it died without an answer.
        """
        with tempfile.TemporaryDirectory() as empty:
            process = self._start(child, empty, environment)
            try:
                out, said = process.communicate(json.dumps(request))
            finally:
                process.kill()
                process.wait()
                with self._lock:
                    self._running.discard(process)
        answers = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if process.returncode != 0 or not answers:
            last = (said.strip().splitlines() or ["no output"])[-1]
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
            raise VerificationError(f"the fresh interpreter died ({how}): {last}")
        return answers

    def _start(self, child: str, folder: str, environment: Mapping[str, str] | None) -> subprocess.Popen[str]:
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        if environment is None:
            offline = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
            environment = {**offline, "HF_HUB_OFFLINE": "1"}
        with self._lock:
            if self._over:
                raise VerificationError("the verification is over")
            process = subprocess.Popen(
                [sys.executable, "-I", "-W", "ignore", str(_CHILDREN / f"{child}.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                env={**environment, **quiet},
            )
            self._running.add(process)
        return process


def ask(child: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """One interpreter by itself; see :meth:`Children.ask`."""
    with Children() as children:
        return children.ask(child, request)
