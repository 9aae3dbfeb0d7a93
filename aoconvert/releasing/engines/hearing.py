"""What workers say, put together: events and warnings are passed on, their progress is shown as one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from aoconvert.errors import AoconvertError
from aoconvert.progress import Progress
from aoconvert.releasing.engines.task import Message
from aoconvert.releasing.record import Failure, VariantRecord, failure_of
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


@dataclass
class Left:
    """The variants of a task that have no record yet."""

    names: list[str]
    _started: set[str] = field(default_factory=set)
    _failure: Failure | None = None

    def hear(self, message: Message) -> bool:
        """Take down what a worker says; gives whether it is news: a worker that goes on may repeat what was said."""
        match message:
            case {"event": {"event": "variant_started", "variant": name}}:
                self._started.add(name)
            case {"record": {"name": name}}:
                if name not in self.names:
                    return False
                self.names.remove(name)
            case {"failure": failure}:
                self._failure = Failure.model_validate(failure)
        return True

    def give_up(self, error: AoconvertError, records: Mapping[str, VariantRecord]) -> Iterator[Message]:
        """Say that those variants failed that the worker was at when it ended: all, where it had begun with none.

        Args:
            error: why, where the worker did not say so itself.
            records: a record of each variant, to say in it that it failed.
        """
        failure = self._failure or failure_of(error)
        self._failure = None
        for name in [name for name in self.names if name in self._started] or list(self.names):
            self.names.remove(name)
            yield {"event": {"event": "failed", "variant": name, "error": failure.model_dump()}}
            yield {"record": records[name].model_copy(update={"error": failure}).model_dump(mode="json")}
