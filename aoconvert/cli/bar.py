"""The progress display on stderr: what is done, then bytes, rate, time left and the current tensor, on one line."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from aoconvert.cli.streams import write_stderr
from aoconvert.humanize import escape

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_BAR = 12  # columns
_FIGURES = 62  # columns: stage, bar, bytes, rate, time left, and a space between each two
_ERASE = "\r\033[2K"


class Bar:
    """Draws one stage at a time; see ``aoconvert.progress.Progress``.

    Until the first stage begins, a line says what the command does: the first seconds go into imports.
    """

    def __init__(self, doing: str) -> None:
        self._bars: RichProgress | None = None
        self._waiting = False
        self._wait(doing)

    def start(self, stage: str, total_bytes: int) -> None:
        """Begin a stage on a line of its own; without a number of bytes it shows how long it takes."""
        self.finish()
        self._bars = _with_bytes() if total_bytes else _without_bytes()
        self._task = self._bars.add_task(stage, total=total_bytes or None, current="")
        self._bars.start()

    def advance(self, nbytes: int, current: str = "") -> None:
        """Show what was done."""
        if self._bars is not None:
            room = self._bars.console.width - _FIGURES
            self._bars.update(self._task, advance=nbytes, current=shorten(escape(current), room))

    def finish(self) -> None:
        """Leave the finished line on the screen."""
        if self._waiting:
            self._waiting = False
            write_stderr(_ERASE)
        if self._bars is not None:
            self._bars.update(self._task, current="")
            self._bars.stop()
            self._bars = None

    def _wait(self, doing: str) -> None:
        """Say what is being done without importing rich."""
        columns = shutil.get_terminal_size().columns
        line = escape(" ".join(doing.split()))
        line = line if len(line) + 2 <= columns else f"{line[: max(columns - 3, 0)]}…"
        write_stderr(f"{line} …")
        self._waiting = True


def shorten(name: str, room: int) -> str:
    """A tensor's or file's name in ``room`` columns: its end says more than its start."""
    if len(name) <= room:
        return name
    return f"…{name[len(name) - room + 1 :]}" if room > 1 else ""


def _with_bytes() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=_BAR),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[current]}", markup=False),
        console=Console(stderr=True),
        refresh_per_second=8,
    )


def _without_bytes() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=_BAR),
        TimeElapsedColumn(),
        TextColumn("{task.fields[current]}", markup=False),
        console=Console(stderr=True),
        refresh_per_second=8,
    )
