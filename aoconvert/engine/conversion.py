"""A consumer of a pass that makes a checkpoint: slices become what is written, tensor by tensor."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from aoconvert.engine.assembly import Assembly, Part
from aoconvert.engine.block_quantizer import WeightSlice
from aoconvert.engine.blocks import torchao_at_work
from aoconvert.engine.carrying import carry
from aoconvert.engine.channel import Channel, Stages
from aoconvert.engine.messages import Begin, End, Message, Rows, Whole, nothing
from aoconvert.engine.quantizer import Outcome, Pending, Quantizer
from aoconvert.engine.read_ahead import Reading, Slice
from aoconvert.engine.results import ComponentResult, Seconds
from aoconvert.engine.stream import stream
from aoconvert.engine.write import FileWriter
from aoconvert.errors import QuantizeError
from aoconvert.formats.digest import Mark
from aoconvert.planning.needs import READ_AHEAD_BYTES
from aoconvert.planning.slices import is_streamed
from aoconvert.planning.types import StreamedPlan, TensorPlan
from aoconvert.progress import Progress
from aoconvert.schemes.error_stats import ErrorStats

if TYPE_CHECKING:
    from aoconvert.engine.resume import Journal


@dataclass
class _Work:
    """A tensor whose slices are coming."""

    plan: TensorPlan
    assembly: Assembly
    error: ErrorStats | None
    devices: set[str] = field(default_factory=set)

    @property
    def device(self) -> str | None:
        """The type of the device that quantized it: the CPU where that did a part of it."""
        return min(self.devices, key=lambda kind: kind != "cpu", default=None)


class _UnderWay(NamedTuple):
    """A slice, and where it goes; ``pending`` where it is quantized."""

    piece: Slice
    work: _Work
    into: Part
    pending: Pending | None


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
        self.wanted: Mapping[str, Sequence[TensorPlan]]
        self.wanted = {name: [tensors[name]] for name in plan.order if name not in done}
        self.result = ComponentResult(done, dict(journal.sealed(plan)), Seconds())
        self._marks: dict[str, dict[str, Mark]] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._work: _Work | None = None
        self._waited = 0.0
        self._out: Channel[Message] = Channel(READ_AHEAD_BYTES)
        self._writer = FileWriter(
            plan, journal, self._marks_of, progress, self.result.tensors, self.result.files, self.result.seconds
        )

    def open(self, quantizer: Quantizer, stages: Stages) -> None:
        """Start the writer's thread."""
        self._quantizer = quantizer
        stages.start("aoconvert-writer", lambda: self._writer.run(self._out), self._out)

    def take(self, piece: Slice) -> None:
        """Cast or quantize a slice, and pass on what is ready to be written; those of a tensor come in order.

        Raises:
            QuantizeError: NaN or infinity in a weight, or torchao failed on it.
            Closed: the writer has failed.
        """
        began, self._waited = time.perf_counter(), 0.0
        self._marks.setdefault(piece.name, {}).update(piece.marks)
        [plan] = self.wanted[piece.name]
        work = self._begin(plan) if piece.start == 0 else self._work
        assert work is not None
        self._work = None if piece.last else work  # what is finished is not kept until the next one comes
        into = work.assembly.rows(piece.start, piece.stop)
        pending = None
        if plan.scheme is not None:
            rows = WeightSlice(plan.name, piece.data, getattr(torch, plan.dtype), plan.scheme)
            kept = piece.codes
            pending = self._quantizer.start(rows, into) if kept is None else partial(_carry, rows, kept, into)
        self._under_way.append(_UnderWay(piece, work, into, pending))
        while self._quantizer.crowded([each.piece.data.nbytes if each.pending else None for each in self._under_way]):
            self._finish(*self._under_way.popleft())
        self.result.seconds.quantize += time.perf_counter() - began - self._waited

    def finish(self) -> None:
        """Pass on the rest; as ``take``."""
        while self._under_way:
            self._finish(*self._under_way.popleft())
        self._out.end()

    def _begin(self, plan: TensorPlan) -> _Work:
        dtype, scheme = getattr(torch, plan.dtype), plan.scheme
        if scheme is None:
            return _Work(plan, Assembly.of(plan.shape, dtype, None, is_streamed(plan)), None)
        pinned = self._quantizer.takes_page_locked(scheme)
        with torchao_at_work(plan.name, scheme):
            return _Work(plan, Assembly.of(plan.shape, dtype, scheme, is_streamed(plan), pinned), ErrorStats())

    def _finish(self, piece: Slice, work: _Work, into: Part, pending: Pending | None) -> None:
        plan, assembly, release = work.plan, work.assembly, piece.release
        if piece.start == 0 and assembly.streamed:
            self._send(Begin(plan, assembly.like), 0)
        if pending is None:
            into.put(piece.data, 0, piece.stop - piece.start)
            _check_overflow(plan, piece.data, into.first())
        else:
            error, device = pending()
            assert work.error is not None
            work.error.merge(error)
            if not plan.carried:
                work.devices.add(device)
        if pending is not None or into.first() is not piece.data:  # else it stays until it is written
            piece.release()
            release = nothing
        if assembly.streamed:
            rows = into.first()
            self._send(Rows(plan, rows, release), rows.nbytes)
        if piece.last and assembly.streamed:
            self._send(End(plan, assembly.rest(), work.error, work.device), 0)
        elif piece.last:
            self._send(Whole(plan, assembly.result(), work.error, work.device, release), plan.bytes_out)

    def _send(self, message: Message, nbytes: int) -> None:
        began = time.perf_counter()
        self._out.put(message, nbytes)
        self._waited += time.perf_counter() - began

    def _marks_of(self, name: str) -> Mapping[str, Mark]:
        return self._marks.pop(name, {})


def _carry(rows: WeightSlice, codes: Mapping[str, torch.Tensor], into: Part) -> Outcome:
    return Outcome(carry(rows, codes, into), "cpu")


def _check_overflow(plan: TensorPlan, data: torch.Tensor, rows: torch.Tensor) -> None:
    """Refuse values that were finite in the source and are not any more.

    Raises:
        QuantizeError: with the tensor's name.
    """
    if data.dtype == rows.dtype or not rows.is_floating_point() or bool(rows.isfinite().all()):
        return
    if bool((rows.isinf() & data.isfinite()).any()):
        raise QuantizeError(f"{plan.name} overflows {plan.dtype}", hint="choose --dtype bfloat16")


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
