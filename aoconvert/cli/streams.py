"""Standard streams, which may be closed, full, or a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream ends at a terminal; one that is closed does not."""
    return stream is not None and stream.isatty()


def shows_color(stream: TextIO | None) -> bool:
    """Whether to color a stream: a terminal that knows how to, and nobody said no (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write_stderr(text: str) -> None:
    """Write to stderr; where it is closed or full nobody can be told, and the work goes on."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


def write_stdout(text: str) -> None:
    """Write to stdout.

    A reader that has had enough (``| head -1``) is not an error. Where stdout is closed or full, the exit code says so,
    as with other tools: there is no stream left for a message.

    Raises:
        SystemExit: with code 1, stdout is closed or full.
    """
    if sys.stdout is None:
        raise SystemExit(1)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        give_up_stdout()
    except OSError:
        give_up_stdout()
        raise SystemExit(1) from None


def give_up_stdout() -> None:
    """Let what is left for stdout go nowhere: the interpreter flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
