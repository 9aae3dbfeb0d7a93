"""The threads of a pass and the queues between them, bounded by bytes, that an error in any thread opens."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The other side is gone; its error, if any, is raised where it happened."""


class Channel(Generic[T]):
    """Holds items up to ``limit`` bytes together, and always at least one.

    One tensor may be larger than the limit; bounding the number of items instead would let two giants wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._ended = False
        self._broken = False
        self._change = threading.Condition()

    def put(self, item: T, nbytes: int) -> None:
        """Add an item, waiting for room.

        Raises:
            Closed: nobody will take it.
        """
        with self._change:
            self._wait(nbytes)
            self._items.append((item, nbytes))
            self._bytes += nbytes
            self._change.notify_all()

    def wait(self, nbytes: int) -> None:
        """Wait until there is room for so many bytes; for the only thread that puts, before it makes them.

        Raises:
            Closed: nobody will take it.
        """
        with self._change:
            self._wait(nbytes)

    def _wait(self, nbytes: int) -> None:
        while self._items and self._bytes + nbytes > self._limit and not self._broken:
            self._change.wait()
        if self._broken:
            raise Closed

    def get(self) -> T | None:
        """The next item, waiting for one; ``None`` after the last.

        Raises:
            Closed: nobody will send one.
        """
        with self._change:
            while not self._items and not self._ended and not self._broken:
                # a wait without a time-out cannot be interrupted by Ctrl-C on every platform
                self._change.wait(0.5)
            if self._broken:
                raise Closed
            if not self._items:
                return None
            item, nbytes = self._items.popleft()
            self._bytes -= nbytes
            self._change.notify_all()
            return item

    def end(self) -> None:
        """No more items will come."""
        with self._change:
            self._ended = True
            self._change.notify_all()

    def close(self) -> None:
        """Give up: wake both sides, and drop what waits."""
        with self._change:
            self._broken = True
            self._items.clear()
            self._bytes = 0
            self._change.notify_all()


class Closable(Protocol):
    """What a stage may wait for."""

    def close(self) -> None:
        """Give up: wake whoever waits."""


class Stages:
    """The threads of a pass, beside the calling one: when one fails, all give up, and the first error is raised."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []
        self._waited_for: list[Closable] = []

    def start(self, name: str, work: Callable[[], None], *waited_for: Closable) -> None:
        """Start a stage; ``waited_for`` is closed when any stage fails."""
        self._waited_for += waited_for
        self._threads.append(threading.Thread(target=self._guard, args=(work,), name=name, daemon=True))
        self._threads[-1].start()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Closed:
            pass
        except BaseException as error:
            self._failures.append(error)
            self._give_up()

    def _give_up(self) -> None:
        for item in list(self._waited_for):
            item.close()

    def end(self, error: BaseException | None) -> None:
        """Wait for every thread; with the calling thread's ``error``, where it has one, they give up before.

        Raises:
            BaseException: what a stage failed with; the calling thread's own error goes first, and is not raised here.
        """
        if error is not None:
            self._give_up()
        for thread in self._threads:
            thread.join()
        if self._failures and (error is None or isinstance(error, Closed)):
            raise self._failures[0]
