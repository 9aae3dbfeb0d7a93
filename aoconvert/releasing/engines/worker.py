"""Makes the variants of a task, and says as it goes what is done.

A message is a value for JSON with one key:

``event``
    as ``release --json`` prints it.
``stage``, ``advance``, ``finish``
    progress within a step, see ``aoconvert.progress``: name and bytes, bytes and what is at work, null.
``log``
    name, level and text of a logged warning.
``record``
    a variant that is judged, or that failed.
``failure``
    why the task's other variants were not made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

from aoconvert.environment import host_by_default
from aoconvert.errors import AoconvertError, HostMemoryError, is_out_of_memory
from aoconvert.releasing.engines.task import Message, Task
from aoconvert.releasing.record import failure_of
from aoconvert.releasing.steps import Steps
from aoconvert.releasing.variants import plan_variants

Say = Callable[[Message], None]

_PARTS = 100  # messages about the progress of a stage, at most


@host_by_default()
def run_task(task: Task, say: Say) -> int:
    """Make the variants of a task; gives the exit code of a process that did.

    What goes wrong with a variant is in its record; ``failure`` tells why others have none.
    """
    try:
        with _logged(say):
            variants = task.list_variants()
            plan_variants(variants, task.options, lambda each: None)
            steps = Steps(task.options, _Telling(say), lambda event: say({"event": event}))
            for record in steps.make(variants):
                say({"record": record.model_dump(mode="json")})
        return 0
    except AoconvertError as error:
        failed = error
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("AOCONVERT_DEBUG") == "1":
            raise
        failed = _unexpected(error)
    say({"failure": failure_of(failed).model_dump()})
    return failed.exit_code


def _unexpected(error: Exception) -> AoconvertError:
    if is_out_of_memory(error):
        return HostMemoryError("out of memory", hint="close other programs, or use fewer --jobs")
    from aoconvert.sources.hub_errors import without_secrets

    said = without_secrets(str(error)).splitlines()
    hint = "AOCONVERT_DEBUG=1 shows the traceback; please report this"
    return AoconvertError(f"unexpected {type(error).__name__}: {said[0] if said else ''}", hint=hint)


class _Telling:
    """Progress as messages; may be called from any thread."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._total, self._done, self._said = 0, 0, 0

    def start(self, stage: str, total_bytes: int) -> None:
        """See ``Progress``."""
        with self._lock:
            self._total, self._done, self._said = total_bytes, 0, 0
            self._say({"stage": [stage, total_bytes]})

    def advance(self, nbytes: int, current: str = "") -> None:
        """See ``Progress``."""
        with self._lock:
            self._done += nbytes
            if (self._done - self._said) * _PARTS >= max(self._total, 1):
                self._say({"advance": [self._done - self._said, current]})
                self._said = self._done

    def finish(self) -> None:
        """See ``Progress``."""
        self._say({"finish": None})


class _Warnings(logging.Handler):
    """Passes warnings on."""

    def __init__(self, say: Say) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        self._say({"log": [record.name, record.levelno, record.getMessage()]})


@contextlib.contextmanager
def _logged(say: Say) -> Iterator[None]:
    handler = _Warnings(say)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
