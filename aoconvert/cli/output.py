"""What the terminal sees: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aoconvert.cli.streams import is_terminal, shows_color, write_stderr, write_stdout
from aoconvert.humanize import escape
from aoconvert.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.table import Table

Mode = Literal["human", "json", "quiet"]

# columns of a table: text that may fold, text that may not, numbers
FOLD: Mapping[str, Any] = {"overflow": "fold"}
WHOLE: Mapping[str, Any] = {"no_wrap": True}
NUMBER: Mapping[str, Any] = {"justify": "right", "no_wrap": True}

_ONE_LINE = 10_000  # columns, wider than any table
_LONGEST = 4000  # characters of an error or a warning
_UNPRINTABLE = re.compile(
    "[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class Output:
    """One call renders a result for people, for programs (``--json``) or in one word (``--quiet``)."""

    mode: Mode
    progress: bool = True
    warnings: bool = True

    @classmethod
    def from_flags(cls, *, json_mode: bool = False, quiet: bool = False, no_progress: bool = False) -> Output:
        """By the options that every command has."""
        mode: Mode = "json" if json_mode else "quiet" if quiet else "human"
        return cls(mode, progress=not (no_progress or quiet), warnings=not quiet)

    def result(self, human: Callable[[], RenderableType], data: Any, essential: str) -> None:
        """Print a result; ``human`` is only called where it is shown, and text of its is printed as it is."""
        if self.mode == "json":
            write_stdout(_json(data))
        elif self.mode == "quiet":
            write_stdout(_lines(essential))
        elif isinstance(shown := human(), str):
            write_stdout(_lines(shown))
        else:
            import io

            from rich.console import Console

            # without a terminal nothing is folded: what somebody looks for with grep stays on one line
            terminal = is_terminal(sys.stdout)
            drawn = io.StringIO()
            console = Console(
                file=drawn, highlight=False, force_terminal=terminal, width=None if terminal else _ONE_LINE
            )
            console.print(_Escaped(shown))
            write_stdout("".join(f"{line.rstrip()}\n" for line in drawn.getvalue().splitlines()))

    def event(self, data: Any) -> None:
        """Print one step of a long command: a line of JSON; nothing for people, who have the progress bar."""
        if self.mode == "json":
            write_stdout(_json(data))

    @staticmethod
    def table(
        rows: Iterable[Sequence[RenderableType]], columns: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Table:
        """A table for people.

        Args:
            rows: what stands in it; text is rich's markup.
            columns: title → ``FOLD``, ``WHOLE`` or ``NUMBER``; ``None`` for a label and what it is, without titles.
        """
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=columns is not None)
        for title, style in (columns or {"label": {"style": "bold", **WHOLE}, "what it is": FOLD}).items():
            table.add_column(title, **style)
        for row in rows:
            table.add_row(*row)
        return table

    def warning(self, message: str) -> None:
        """A warning on stderr; not with ``--quiet``."""
        if self.warnings:
            self._line("warning", message, "33")

    def error(
        self, kind: str, message: str, hint: str | None, exit_code: int, *, problems: Sequence[str], retryable: bool
    ) -> None:
        """An error: JSON on stdout, or one line for each problem and the hint on stderr."""
        if self.mode == "json":
            values: dict[str, Any] = {"type": kind, "message": message, "hint": hint, "exit_code": exit_code}
            values |= {"retryable": retryable, "problems": list(problems)}
            write_stdout(_json({"error": values}))
            return
        for line in problems:
            self._line("error", line, "31")
        if hint:
            self._line("hint", hint, "2")

    def _line(self, label: str, text: str, color: str) -> None:
        text = escape(" ".join(text.split()))
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
        head = f"\033[{color}m{label}:\033[0m" if shows_color(sys.stderr) else f"{label}:"
        write_stderr(f"{head} {text}\n")

    @contextlib.contextmanager
    def watch(self, doing: str) -> Iterator[Progress]:
        """A progress display on stderr; silent without a terminal or with ``--no-progress``.

        Enter it before anything that takes long is imported: ``doing`` is on the screen at once. It is closed also
        when an error passes: the message gets a line of its own, and the cursor comes back.
        """
        if not self.progress or not is_terminal(sys.stderr):
            yield Silent()
            return
        from aoconvert.cli.bar import Bar

        bar = Bar(doing)
        try:
            yield bar
        finally:
            bar.finish()


@dataclass(frozen=True)
class _Escaped:
    """What rich draws, with the characters escaped that would move the cursor, change colors or turn text round."""

    shown: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for text, style, control in console.render(self.shown, options):
            yield Segment(_lines(text)[:-1], style, control)


def _lines(text: str) -> str:
    return "".join(f"{escape(line)}\n" for line in text.split("\n"))


def _json(data: Any) -> str:
    """One line of JSON, without a character that a terminal would obey."""
    text = json.dumps(data, ensure_ascii=False)
    return _UNPRINTABLE.sub(_unicode_escape, text) + "\n"


def _unicode_escape(found: re.Match[str]) -> str:
    """As JSON has it: four hexadecimal digits for each unit of UTF-16."""
    units = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
