"""One pass over a component's tensors: read once, slice by slice, for one consumer or several."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from aoconvert.engine.acceleration import count_bytes, open_kernels
from aoconvert.engine.channel import Channel, Stages
from aoconvert.engine.device_streams import Lanes, open_devices
from aoconvert.engine.eager import threads
from aoconvert.engine.quantize_stage import Message, Processor
from aoconvert.engine.read_ahead import Cut, ReadAhead, Reading, Slice
from aoconvert.engine.results import ComponentResult, Seconds
from aoconvert.engine.write import FileWriter
from aoconvert.environment import available_cores
from aoconvert.formats.digest import Mark
from aoconvert.planning.needs import READ_AHEAD_BYTES
from aoconvert.planning.slices import common_slices
from aoconvert.planning.types import StreamedPlan, TensorPlan
from aoconvert.progress import Progress

if TYPE_CHECKING:
    from aoconvert.engine.resume import Journal


class Consumer(Protocol):
    """Takes the slices of a pass.

    Attributes:
        wanted: tensor → what it makes of it, one plan for each scheme; in the order in which it takes them.
    """

    @property
    def wanted(self) -> Mapping[str, Sequence[TensorPlan]]:
        """See above."""

    def open(self, lanes: Lanes, stages: Stages) -> None:
        """Get ready; ``lanes`` quantize, ``stages`` takes threads."""

    def take(self, piece: Slice) -> None:
        """Work on a slice of a tensor that is wanted, and release it."""

    def finish(self) -> None:
        """No more slices will come."""


def stream(reading: Reading, consumers: Sequence[Consumer], devices: Sequence[str], *, allow_cpu: bool) -> float:
    """Read what the consumers want, once, and give each the slices of its tensors.

    Bounded channels connect the stages, so memory does not depend on the model's size. The consumers run in the
    calling thread, which is the one that Ctrl-C reaches.

    Args:
        reading: gives the tensors.
        consumers: of the same component; those that share tensors take them in the same order.
        devices: where weights are quantized.
        allow_cpu: the CPU takes what a GPU cannot; otherwise that is an error.

    Returns:
        Seconds that the reader was at work.

    Raises:
        AoconvertError: of whichever stage failed first.
    """
    devices = open_devices(devices, allow_cpu=allow_cpu)
    plans: dict[str, list[TensorPlan]] = {}
    for consumer in consumers:
        for name, tensors in consumer.wanted.items():
            plans.setdefault(name, []).extend(tensors)
    inventory = [Cut(tensors[0], common_slices(tensors)) for tensors in plans.values()]
    to_quantize = count_bytes(tensor for tensors in plans.values() for tensor in tensors)
    with (
        ReadAhead(reading, inventory, devices) as ahead,
        torch.no_grad(),
        open_kernels(devices[0], to_quantize) as kernels,
        threads(available_cores()) as pool,
    ):
        lanes = Lanes(devices, kernels, allow_cpu, pool)
        for consumer in consumers:
            consumer.open(lanes, ahead.stages)
        for piece in ahead:
            takers = [consumer for consumer in consumers if piece.name in consumer.wanted]
            piece = piece.shared(len(takers))
            for consumer in takers:
                consumer.take(piece)
            del piece
        for consumer in consumers:
            consumer.finish()
    return ahead.seconds


class Conversion:
    """A consumer that quantizes a component's tensors and writes them to its files.

    Args:
        plan: the component.
        journal: knows the tensors that an earlier run has finished, and notes those that are finished now.
        progress: is told of each tensor.

    Attributes:
        wanted: the tensors that are not finished.
        result: what was written, by this run or an earlier one; whole when the pass has ended.
    """

    def __init__(self, plan: StreamedPlan, journal: Journal, progress: Progress) -> None:
        done = dict(journal.finished(plan))
        for tensor in plan.tensors:
            if tensor.name in done:
                progress.advance(tensor.bytes_in, tensor.name)
        tensors = {tensor.name: tensor for tensor in plan.tensors}
        self.wanted = {name: [tensors[name]] for name in plan.order if name not in done}
        self.result = ComponentResult(done, dict(journal.sealed(plan)), Seconds())
        self._marks: dict[str, dict[str, Mark]] = {}
        self._waited = 0.0
        self._out: Channel[Message] = Channel(READ_AHEAD_BYTES)
        self._writer = FileWriter(
            plan, journal, self._marks_of, progress, self.result.tensors, self.result.files, self.result.seconds
        )

    def open(self, lanes: Lanes, stages: Stages) -> None:
        """Start the writer's thread."""
        self._processor = Processor([tensor for [tensor] in self.wanted.values()], lanes, self._send)
        stages.start("aoconvert-writer", lambda: self._writer.run(self._out), self._out)

    def take(self, piece: Slice) -> None:
        """Cast or quantize it, and pass on what is ready to be written."""
        began, self._waited = time.perf_counter(), 0.0
        self._marks.setdefault(piece.name, {}).update(piece.marks)
        self._processor.take(piece)
        self.result.seconds.quantize += time.perf_counter() - began - self._waited

    def finish(self) -> None:
        """Pass on the rest."""
        self._processor.flush()
        self._out.end()

    def _send(self, message: Message, nbytes: int) -> None:
        began = time.perf_counter()
        self._out.put(message, nbytes)
        self._waited += time.perf_counter() - began

    def _marks_of(self, name: str) -> Mapping[str, Mark]:
        return self._marks.pop(name, {})


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

    Raises:
        AoconvertError: of whichever stage failed first; what is finished stays, and the journal knows it.
    """
    conversion = Conversion(plan, journal, progress)
    conversion.result.seconds.reader = stream(reading, [conversion], devices, allow_cpu=allow_cpu)
    return conversion.result
