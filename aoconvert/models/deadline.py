"""An end for code that nobody here wrote: a model's forward may never come to one by itself."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from aoconvert.errors import is_out_of_memory

_LOOK = 0.2  # seconds between two looks at the clock
_AGAIN = 2.0  # seconds until it is stopped again: a class may go on whatever is raised in it


class TookTooMuch(Exception):
    """What was stopped: it took more time, or memory, than anybody gives it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Stop what runs within once this process has taken so many seconds of CPU time, or has no memory for it.

    It is stopped between two of Python's instructions, as by Ctrl-C: what is in a library's own code goes on there.

    Raises:
        TookTooMuch: it was stopped.
    """
    over, stopped = threading.Event(), threading.Event()
    watch = threading.Thread(target=_stop, args=(threading.get_ident(), seconds, over, stopped), daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        if stopped.is_set() or is_out_of_memory(error):  # a class may make another error of it
            raise TookTooMuch from error
        raise
    finally:
        try:
            over.set()
        finally:  # it may have been stopped just there
            over.set()
            watch.join()
            _raise_in(threading.get_ident(), None)


def _stop(thread: int, seconds: float, over: threading.Event, stopped: threading.Event) -> None:
    until = time.process_time() + seconds
    while not over.wait(_LOOK):
        if time.process_time() > until:
            stopped.set()
            _raise_in(thread, TookTooMuch)
            over.wait(_AGAIN)


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """See ``PyThreadState_SetAsyncExc`` in Python's C API; ``None`` takes back what was not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )
