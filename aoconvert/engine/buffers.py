"""Buffers that are used again: what is read into fresh memory costs a page fault every four kilobytes."""

from __future__ import annotations

import threading

import torch

from aoconvert import accelerators
from aoconvert.engine.channel import Closed


class BufferPool:
    """A few byte buffers of one size.

    Args:
        size: bytes of each.
        count: how many there are at most; they are made when they are first wanted.
        pinned: page-locked, for asynchronous copies to a GPU.
    """

    def __init__(self, size: int, count: int, *, pinned: bool = False) -> None:
        self._size = size
        self._left = count
        self._pinned = pinned
        self._free: list[torch.Tensor] = []
        self._closed = False
        self._change = threading.Condition()

    def take(self, nbytes: int) -> torch.Tensor | None:
        """A uint8 tensor of ``size`` elements, waiting for one; ``None`` for what is larger than that.

        Raises:
            Closed: the work was given up.
        """
        if nbytes > self._size:
            return None
        with self._change:
            while not self._free and not self._left and not self._closed:
                self._change.wait(0.5)
            if self._closed:
                raise Closed
            if self._free:
                return self._free.pop()
            self._left -= 1
        if self._pinned:
            return accelerators.page_locked((self._size,), (1,), torch.uint8)
        return torch.empty(self._size, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor | None) -> None:
        """Give a buffer back; nobody may look at it any more."""
        if buffer is not None:
            with self._change:
                self._free.append(buffer)
                self._change.notify()

    def close(self) -> None:
        """Wake whoever waits for a buffer."""
        with self._change:
            self._closed = True
            self._change.notify_all()
