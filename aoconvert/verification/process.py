"""Fresh interpreters: what a user's machine would see, with nothing of aoconvert in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from aoconvert.errors import VerificationError
from aoconvert.humanize import size
from aoconvert.memory import anonymous_bytes, available_bytes
from aoconvert.verification.limits import MEMORY, SECONDS, Limits, reserve

_CHILDREN = Path(__file__).parent / "children"
_LOOK = 0.1  # seconds between two looks at a child
_MOST_WRITTEN = 2 << 30  # bytes that a child answers and says
_LAST = 1 << 16  # of what it says, where the last line is looked for
_FOLLOWED = 1 << 20  # bytes of answers that are looked at together while a child runs


@dataclass(frozen=True)
class _Written:
    """The files that an interpreter's answers, and all else that it says, go to."""

    out: IO[bytes]
    said: IO[bytes]

    def nbytes(self) -> int:
        """Of both."""
        return sum(os.fstat(file.fileno()).st_size for file in (self.out, self.said))


@dataclass(frozen=True)
class _Child:
    """A running interpreter."""

    process: subprocess.Popen[bytes]
    written: _Written

    def end(self) -> None:
        """End it, and what it started itself."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def answers(self) -> list[dict[str, Any]]:
        """What it answered; a line that was cut short is not an answer."""
        self.written.out.seek(0)
        return list(_parse(self.written.out))

    def last_line(self) -> str:
        """The last line of what it said."""
        said = self.written.said
        said.seek(max(0, said.seek(0, os.SEEK_END) - _LAST))
        lines = said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


class _Follower:
    """Hands on the lines of an answer as they come. The file's position is the child's, so it is not moved."""

    def __init__(self, out: IO[bytes], notice: Callable[[dict[str, Any]], None] | None) -> None:
        self._out, self._notice, self._read = out, notice, 0

    def look(self) -> None:
        if self._notice is None:
            return
        while new := os.pread(self._out.fileno(), _FOLLOWED, self._read):
            lines, newline, _ = new.rpartition(b"\n")
            if not newline:  # longer than what is read at once: it is in the answer at the end
                self._read += len(new) if len(new) == _FOLLOWED else 0
                return
            self._read += len(lines) + 1
            for answer in _parse(lines.split(b"\n")):
                self._notice(answer)


def _parse(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                yield answer


class Ended(VerificationError):
    """An interpreter was ended, as it took more time, memory or space for what it writes than it may.

    Attributes:
        of: what it took too much of.
        answers: what it had answered until then.
    """

    def __init__(self, message: str, of: Literal["time", "memory", "space"], child: _Child) -> None:
        super().__init__(message)
        child.end()
        self.of = of
        self.answers = child.answers() if of != "space" else []


def start_interpreter(program: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start a fresh interpreter that runs a program; ``options`` are those of ``subprocess.Popen``."""
    return subprocess.Popen([sys.executable, "-I", "-W", "ignore", str(program)], **options)


class Children:
    """The interpreters that run side by side; those that still run at the end of the ``with`` block are ended.

    Args:
        limits: of each of them; by default what the environment says.
        folder: where their programs are.

    Raises:
        UsageError: the environment says no sensible limit.
    """

    def __init__(self, limits: Limits | None = None, folder: Path = _CHILDREN) -> None:
        self._limits = limits or Limits.read()
        self._folder = folder
        self._running: set[_Child] = set()
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
            for child in self._running:
                child.end()

    def ask(
        self,
        program: str,
        request: dict[str, Any],
        *,
        nbytes: int = 0,
        fetched: int = 0,
        environment: Mapping[str, str] | None = None,
        notice: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Run a program of ``children`` with a request on stdin, and read its answer, one JSON value a line.

        The interpreter is isolated (``-I``: no ``PYTHON*`` variables, no current folder), and offline unless it is
        given another ``environment``. Threads may call this at the same time.

        Args:
            program: its name.
            request: what it is asked.
            nbytes: of the files that it opens: by them it gets its time.
            fetched: of these, what it fetches from the Hub first.
            environment: its variables.
            notice: is given each line of the answer while the program runs.

        Raises:
            VerificationError: it died without an answer.
            Ended: it took more than it may.
        """
        with contextlib.ExitStack() as stack:
            empty = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            # files, not pipes: what a child started itself may hold a pipe open for ever
            question, out, said = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            question.write(json.dumps(request).encode())
            question.seek(0)
            child = self._start(program, empty, environment, question, _Written(out, said))
            try:
                self._watch(child, self._limits.seconds_for(nbytes, fetched), _Follower(out, notice))
                answers, code = child.answers(), child.process.returncode
            finally:
                child.end()
                with self._lock:
                    self._running.discard(child)
            if code != 0 or not answers:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                raise VerificationError(f"the fresh interpreter died ({how}): {child.last_line()}")
            return answers

    def _start(
        self, program: str, folder: str, environment: Mapping[str, str] | None, question: IO[bytes], written: _Written
    ) -> _Child:
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        if environment is None:
            offline = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
            environment = {**offline, "HF_HUB_OFFLINE": "1"}
        with self._lock:
            if self._over:
                raise VerificationError("the verification is over")
            process = start_interpreter(
                self._folder / f"{program}.py",
                stdin=question,
                stdout=written.out,
                stderr=written.said,
                cwd=folder,
                env={**environment, **quiet},
                process_group=0,
            )
            child = _Child(process, written)
            self._running.add(child)
        return child

    def _watch(self, child: _Child, seconds: float, follower: _Follower) -> None:
        """Wait for a child's end.

        Raises:
            Ended: it took too much.
        """
        deadline, kept = time.monotonic() + seconds, reserve(available_bytes())
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(_LOOK)
                follower.look()
                return
            follower.look()
            if time.monotonic() > deadline:
                why = f"it took more than {seconds:g} s; {SECONDS} sets the limit"
                raise Ended(f"the fresh interpreter was stopped: {why}", "time", child)
            if (lacking := self._no_memory(child, kept)) is not None:
                raise Ended(f"the fresh interpreter was stopped: {lacking}", "memory", child)
            if child.written.nbytes() > _MOST_WRITTEN:
                raise Ended(
                    f"the fresh interpreter was stopped: it wrote more than {size(_MOST_WRITTEN)}", "space", child
                )

    def _no_memory(self, child: _Child, kept: int) -> str | None:
        """Why a child must be ended for the memory that it has, or ``None``.

        Where the machine has less left than ``kept`` it is the one that has most.
        """
        used = anonymous_bytes(child.process.pid)
        if self._limits.memory is not None and used > self._limits.memory:
            return f"it used {size(used)} of memory, and {MEMORY} allows {size(self._limits.memory)}"
        left = available_bytes()
        if left >= kept:
            return None
        with self._lock:
            most = max(anonymous_bytes(other.process.pid) for other in self._running)
        return f"it used {size(used)} of memory, and this machine has {size(left)} left" if used >= most else None
