"""The progress bar: bytes, rate, time left, current tensor; on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress


class Bar:
    """Draws one stage at a time; see ``aoconvert.progress.Progress``."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._task = TaskID(0)

    def start(self, stage: str, total_bytes: int) -> None:
        """Begin a stage on a line of its own."""
        self.finish()
        self._bars = RichProgress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[current]}", markup=False),
            console=Console(stderr=True),
            refresh_per_second=8,
        )
        self._task = self._bars.add_task(stage, total=total_bytes or None, current="")
        self._bars.start()

    def advance(self, nbytes: int, current: str = "") -> None:
        """Show what was done."""
        if self._bars is not None:
            self._bars.update(self._task, advance=nbytes, current=current)

    def finish(self) -> None:
        """Leave the finished line on the screen."""
        if self._bars is not None:
            self._bars.update(self._task, current="")
            self._bars.stop()
            self._bars = None
