"""Which files this process opens, counted as Python's interpreter sees it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_opened: Counter[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | Path):
        _opened[str(arguments[0])] += 1


@contextmanager
def opened_files() -> Iterator[Counter[str]]:
    """How often each file is opened within; from ``open`` and ``os.open``, not by native code."""
    global _opened
    if not hasattr(sys, "aoconvert_audited"):
        sys.addaudithook(_note)  # it cannot be taken back
        sys.aoconvert_audited = True  # type: ignore[attr-defined]
    _opened = Counter()
    try:
        yield _opened
    finally:
        _opened = None
