"""Reading ahead: a thread fills a bounded channel with slices of tensors, for whoever works on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch

from aoconvert.engine.buffers import BufferPool
from aoconvert.engine.channel import Channel, Stages
from aoconvert.environment import available_cores
from aoconvert.formats.digest import Mark
from aoconvert.planning.inventory import Readable
from aoconvert.planning.needs import READ_AHEAD_BYTES
from aoconvert.planning.slices import BUFFERS, PER_DEVICE, SLICE_BYTES

Release = Callable[[], None]


class Reading(Protocol):
    """Gives tensors in host memory, in the source's dtype."""

    def read(self, tensor: Readable, rows: tuple[int, int] | None, into: torch.Tensor | None) -> torch.Tensor:
        """The tensor, or its rows (start, stop); in ``into``, uint8 memory, where that is possible."""

    def codes(self, tensor: Readable, rows: tuple[int, int] | None) -> Mapping[str, torch.Tensor] | None:
        """Codes and scales of the same rows, where the result keeps those of a quantized original."""

    def marks(self) -> Mapping[str, Mark]:
        """How far each weights file was hashed, of those that were read since the last call."""


@dataclass(frozen=True)
class Cut:
    """A tensor to read, and the row ranges (start, stop) that cover it in order."""

    tensor: Readable
    ranges: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Slice:
    """Rows ``start`` to ``stop`` of the tensor ``name``, as they are in the source.

    Attributes:
        last: the tensor ends with it.
        marks: how far each weights file was hashed when it was read.
        release: gives its memory back.
        codes: as of ``Reading.codes``; the memory is their own.
    """

    name: str
    start: int
    stop: int
    last: bool
    data: torch.Tensor
    marks: Mapping[str, Mark]
    release: Release
    codes: Mapping[str, torch.Tensor] | None = None

    def shared(self, count: int) -> Slice:
        """The same, to be released ``count`` times before its memory is given back."""
        left = list(range(count))  # pop is atomic: stages release in threads of their own

        def release() -> None:
            if left.pop() == 0:
                self.release()

        return self if count == 1 else replace(self, release=release)


class ReadAhead:
    """Reads an inventory's tensors in a thread; iterating gives their slices in order.

    While it is open one core stays free for its thread and for those of other stages.

    Args:
        reading: gives the tensors.
        inventory: what to read, in this order.
        devices: where the slices go; for GPUs they are in page-locked memory.

    Attributes:
        stages: the pass's threads; the stages behind this one add theirs.
        seconds: time it was at work, waiting not counted.
    """

    def __init__(self, reading: Reading, inventory: Iterable[Cut], devices: Sequence[str]) -> None:
        self._reading = reading
        self._inventory = inventory
        on_gpu = devices[0] != "cpu"
        self.stages = Stages()
        self._channel: Channel[Slice] = Channel(READ_AHEAD_BYTES)
        self._pool = BufferPool(SLICE_BYTES, BUFFERS + on_gpu * PER_DEVICE * len(devices), pinned=on_gpu)
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self.stages.start("aoconvert-reader", self._read, self._channel, self._pool)
        self._threads = torch.get_num_threads()
        # torch's workers spin while they wait, and on two cores that alone takes a third of the time
        torch.set_num_threads(max(1, available_cores() - 1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        self.stages.end(error)

    def __iter__(self) -> Iterator[Slice]:
        while (item := self._channel.get()) is not None:
            yield item
            del item  # or its memory would live until the next one is there

    def _read(self) -> None:
        for cut in self._inventory:
            rows, nbytes = cut.ranges[-1][1], cut.tensor.bytes_read
            for start, stop in cut.ranges:
                self._put(cut, start, stop, -(-nbytes * (stop - start) // rows) if rows else 0)
        self._channel.end()

    def _put(self, cut: Cut, start: int, stop: int, nbytes: int) -> None:
        buffer = self._pool.take(nbytes)
        if buffer is None:  # a giant: none is read while another waits
            self._channel.wait(nbytes)
        began = time.perf_counter()
        rows = None if len(cut.ranges) == 1 else (start, stop)
        data = self._reading.read(cut.tensor, rows, buffer)
        codes = self._reading.codes(cut.tensor, rows)
        self.seconds += time.perf_counter() - began
        last = stop == cut.ranges[-1][1]
        release = partial(self._pool.give, buffer)
        self._channel.put(
            Slice(cut.tensor.name, start, stop, last, data, self._reading.marks(), release, codes), nbytes
        )
