"""What workers say, put together: events and warnings are passed on, their progress is shown as one line."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from aoconvert.progress import Progress
from aoconvert.releasing.engines.worker import Message
from aoconvert.releasing.record import VariantRecord
from aoconvert.releasing.told import OnEvent


@dataclass
class _AtWork:
    """A worker, as far as a progress line shows it."""

    variant: str = ""
    stage: str = ""
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        part = f" {self.done * 100 // self.total}%" if self.total else ""
        return f"{self.variant} {self.stage}{part}"


@dataclass
class Hearing:
    """Hears several workers; to be used by one thread.

    Attributes:
        progress: shows one line for all of them.
        on_event: takes their events.
    """

    progress: Progress
    on_event: OnEvent
    _workers: dict[int, _AtWork] = field(default_factory=dict)
    _shown: bool = False

    def hear(self, worker: int, message: Message) -> VariantRecord | None:
        """Pass on what a worker says; gives the record of a variant that is done."""
        at_work = self._workers.setdefault(worker, _AtWork())
        match message:
            case {"event": event}:
                if event["event"] == "variant_started":
                    at_work.variant, at_work.stage = event["variant"], ""
                self.on_event(event)
            case {"stage": [stage, total]}:
                at_work.stage, at_work.done, at_work.total = stage, 0, total
                self._show()
            case {"advance": [nbytes, _]}:
                at_work.done += nbytes
                self._show()
            case {"log": [name, level, text]}:
                logging.getLogger(name).log(level, "%s: %s", at_work.variant or "release", text)
            case {"record": record}:
                at_work.stage = ""
                return VariantRecord.model_validate(record)
        return None

    def forget(self, worker: int) -> None:
        """A worker has ended."""
        self._workers.pop(worker, None)

    def pause(self) -> None:
        """Take the line away: somebody else shows progress now."""
        if self._shown:
            self.progress.finish()
        self._shown = False

    def _show(self) -> None:
        if not self._shown:
            self._shown = True
            self.progress.start("release", 0)
        self.progress.advance(0, ", ".join(str(each) for each in self._workers.values() if each.stage))
