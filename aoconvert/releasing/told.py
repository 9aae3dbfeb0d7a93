"""Progress as events, for whoever reads ``release --json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aoconvert.progress import Progress

Event = dict[str, Any]
OnEvent = Callable[[Event], None]

_PARTS = 20  # events of a stage, at most


class ProgressEvents:
    """Passes on what it is told, and says it in an event whenever another twentieth of a stage is done.

    Args:
        progress: what it passes on to.
        on_event: takes the events.
        variants: names of those at work.
    """

    def __init__(self, progress: Progress, on_event: OnEvent, variants: Sequence[str]) -> None:
        self._progress = progress
        self._on_event = on_event
        self._variants = list(variants)
        self._stage, self._done, self._total, self._said = "", 0, 0, 0

    def start(self, stage: str, total_bytes: int) -> None:
        """See ``Progress``."""
        self._stage, self._done, self._total, self._said = stage, 0, total_bytes, 0
        self._progress.start(stage, total_bytes)

    def advance(self, nbytes: int, current: str = "") -> None:
        """See ``Progress``."""
        self._progress.advance(nbytes, current)
        self._done += nbytes
        part = self._done * _PARTS // self._total if self._total else 0
        if part > self._said:
            self._said = part
            named = {"variant": self._variants[0]} if len(self._variants) == 1 else {"variants": self._variants}
            stage = {"stage": self._stage, "done_bytes": self._done, "total_bytes": self._total}
            self._on_event({"event": "progress", **named, **stage})

    def finish(self) -> None:
        """See ``Progress``."""
        self._progress.finish()
