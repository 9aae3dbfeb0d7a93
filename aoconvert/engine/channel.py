"""A queue between two threads, bounded by bytes, that an error on either side opens."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

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
