"""How the work below tells whoever watches what it does. The command line draws it; the library stays silent."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what happens; every method returns quickly and may be called from any thread."""

    def start(self, stage: str, total_bytes: int) -> None:
        """A stage begins, e.g. ``"download"``, ``"quantize"``, ``"copy"``; ``total_bytes`` 0 where unknown."""

    def advance(self, nbytes: int, current: str = "") -> None:
        """``nbytes`` more are done; ``current`` is the tensor or file at work."""

    def finish(self) -> None:
        """The stage is over."""


class Silent:
    """Shows nothing."""

    def start(self, stage: str, total_bytes: int) -> None:
        """See ``Progress``."""

    def advance(self, nbytes: int, current: str = "") -> None:
        """See ``Progress``."""

    def finish(self) -> None:
        """See ``Progress``."""
