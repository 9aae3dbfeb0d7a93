"""Read → quantize → write, one tensor at a time, in three threads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from aoconvert.engine.buffers import BufferPool
from aoconvert.engine.channel import Channel, Closed
from aoconvert.engine.device_streams import Lanes, open_devices
from aoconvert.engine.eager import threads
from aoconvert.engine.quantize_stage import Message, Piece, Processor
from aoconvert.engine.results import ComponentResult, Seconds, TensorResult
from aoconvert.engine.write import FileWriter
from aoconvert.environment import available_cores
from aoconvert.formats.base import SealedFile
from aoconvert.formats.digest import Mark
from aoconvert.kernels.checked import Kernels
from aoconvert.planning.needs import READ_AHEAD_BYTES
from aoconvert.planning.slices import BUFFERS, PER_DEVICE, SLICE_BYTES, slices
from aoconvert.planning.types import StreamedPlan, TensorPlan
from aoconvert.progress import Progress

if TYPE_CHECKING:
    from aoconvert.engine.resume import Journal


class Reading(Protocol):
    """Gives tensors of the plan in host memory, in the source's dtype."""

    def read(self, tensor: TensorPlan, rows: tuple[int, int] | None, into: torch.Tensor | None) -> torch.Tensor:
        """The tensor, or its rows (start, stop); in ``into``, uint8 memory, where that is possible."""

    def marks(self, name: str) -> Mapping[str, Mark]:
        """What was read of which weights file until this tensor was read."""


def run_component(
    plan: StreamedPlan,
    reading: Reading,
    journal: Journal,
    devices: Sequence[str],
    progress: Progress,
    *,
    allow_cpu: bool = False,
) -> ComponentResult:
    """Stream every tensor of a model into its files, but for those that ``journal`` has already.

    Bounded channels connect the stages, so memory does not depend on the model's size. The quantizer runs in the
    calling thread, which is the one that Ctrl-C reaches.

    Raises:
        AoconvertError: of whichever stage failed first; what is finished stays, and the journal knows it.
    """
    done = journal.finished(plan)
    for tensor in plan.tensors:
        if tensor.name in done:
            progress.advance(tensor.bytes_in, tensor.name)
    files = journal.sealed(plan)
    return _Stream(
        plan, reading, journal, devices, allow_cpu, progress, frozenset(done), tensors=done, files=files
    ).run()


@dataclass
class _Stream:
    plan: StreamedPlan
    reading: Reading
    journal: Journal
    devices: Sequence[str]
    allow_cpu: bool
    progress: Progress
    done: frozenset[str]
    seconds: Seconds = field(default_factory=Seconds)
    failures: list[BaseException] = field(default_factory=list)
    tensors: dict[str, TensorResult] = field(default_factory=dict)
    files: dict[str, SealedFile] = field(default_factory=dict)

    def run(self) -> ComponentResult:
        self.devices = open_devices(self.devices, allow_cpu=self.allow_cpu)
        source: Channel[Piece] = Channel(READ_AHEAD_BYTES)
        sink: Channel[Message] = Channel(READ_AHEAD_BYTES)
        on_gpu = self.devices[0] != "cpu"
        pool = BufferPool(SLICE_BYTES, BUFFERS + on_gpu * PER_DEVICE * len(self.devices), pinned=on_gpu)

        def give_up() -> None:
            source.close()
            sink.close()
            pool.close()

        def guarded(work: Callable[[], None]) -> Callable[[], None]:
            def body() -> None:
                try:
                    work()
                except Closed:
                    pass
                except BaseException as error:
                    self.failures.append(error)
                    give_up()

            return body

        writer = FileWriter(
            self.plan, self.journal, self.reading.marks, self.progress, self.tensors, self.files, self.seconds
        )
        threads = [
            threading.Thread(target=guarded(lambda: self._read(source, pool)), name="aoconvert-reader", daemon=True),
            threading.Thread(target=guarded(lambda: writer.run(sink)), name="aoconvert-writer", daemon=True),
        ]
        for thread in threads:
            thread.start()
        threads_before = torch.get_num_threads()
        # One core stays free for reader and writer: torch's workers spin while they wait, and on two cores that alone
        # takes a third of the time.
        torch.set_num_threads(max(1, available_cores() - 1))
        try:
            self._quantize(source, sink)
        except Closed:
            pass
        except BaseException as error:
            self.failures.insert(0, error)
            give_up()
        finally:
            torch.set_num_threads(threads_before)
            if self.failures:
                give_up()
            else:
                sink.end()
            for thread in threads:
                thread.join()
        if self.failures:
            raise self.failures[0]
        return ComponentResult(self.tensors, self.files, self.seconds)

    def _ordered(self) -> Iterator[TensorPlan]:
        plans = {tensor.name: tensor for tensor in self.plan.tensors}
        return (plans[name] for name in self.plan.order if name not in self.done)

    def _read(self, out: Channel[Piece], pool: BufferPool) -> None:
        for tensor in self._ordered():
            pieces = slices(tensor)
            for start, stop in pieces:
                nbytes = -(-tensor.bytes_in * (stop - start) // pieces[-1][1]) if pieces[-1][1] else 0
                buffer = pool.take(nbytes)
                if buffer is None:  # a giant: none is read while another waits
                    out.wait(nbytes)
                began = time.perf_counter()
                data = self.reading.read(tensor, None if len(pieces) == 1 else (start, stop), buffer)
                self.seconds.reader += time.perf_counter() - began
                out.put(Piece(tensor, start, stop, data, partial(pool.give, buffer)), nbytes)
                del data  # or it would live until the next one is read
        out.end()

    def _quantize(self, source: Channel[Piece], out: Channel[Message]) -> None:
        waited = 0.0

        def send(message: Message, nbytes: int) -> None:
            nonlocal waited
            began = time.perf_counter()
            out.put(message, nbytes)
            waited += time.perf_counter() - began

        to_quantize: Counter[str] = Counter()
        for tensor in self._ordered():
            if tensor.scheme is not None:
                to_quantize[tensor.scheme.key] += tensor.bytes_in
        with torch.no_grad(), Kernels(self.devices[0], to_quantize) as kernels, threads(available_cores()) as pool:
            processor = Processor(Lanes(self.devices, kernels, self.allow_cpu, pool), send)
            while (piece := source.get()) is not None:
                began, waited = time.perf_counter(), 0.0
                processor.take(piece)
                self.seconds.quantize += time.perf_counter() - began - waited
                del piece
            processor.flush()
