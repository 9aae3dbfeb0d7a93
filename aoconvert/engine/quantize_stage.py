"""The middle stage: what is read becomes what is written, slice by slice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from aoconvert.engine.assembly import Assembly, quantized_on_meta
from aoconvert.engine.device_streams import Lanes, Pending
from aoconvert.engine.read_ahead import Release, Slice
from aoconvert.errors import QuantizeError
from aoconvert.formats.torch_bin.pickle_tree import is_wrapper
from aoconvert.planning.slices import is_streamed
from aoconvert.planning.types import TensorPlan
from aoconvert.schemes.apply import flatten
from aoconvert.schemes.error_stats import ErrorStats


@dataclass(frozen=True)
class Whole:
    """A finished tensor for its file; ``device``: the type of the one that quantized it."""

    plan: TensorPlan
    tensor: torch.Tensor
    error: ErrorStats | None
    device: str | None
    release: Release


@dataclass(frozen=True)
class Begin:
    """A tensor whose rows come one after the other. ``like`` is what it will be, on meta."""

    plan: TensorPlan
    like: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """The next rows of the first inner tensor, or of a plain tensor."""

    plan: TensorPlan
    rows: torch.Tensor
    release: Release


@dataclass(frozen=True)
class End:
    """The other inner tensors, whole; ``device``: as of ``Whole``."""

    plan: TensorPlan
    rest: Mapping[str, torch.Tensor]
    error: ErrorStats | None
    device: str | None


Message = Whole | Begin | Rows | End
Send = Callable[[Message, int], None]


def nothing() -> None:
    """What has memory of its own needs no release."""


def _check_overflow(plan: TensorPlan, data: torch.Tensor, rows: torch.Tensor) -> None:
    """Refuse values that were finite in the source and are not any more.

    Raises:
        QuantizeError: with the tensor's name.
    """
    if rows.is_floating_point() and not bool(rows.isfinite().all()) and bool((rows.isinf() & data.isfinite()).any()):
        raise QuantizeError(f"{plan.name} overflows {plan.dtype}", hint="choose --dtype bfloat16")


@dataclass
class _Work:
    """A tensor whose pieces are coming: those of its inner tensors that are put together in memory."""

    plan: TensorPlan
    streamed: bool
    error: ErrorStats | None
    assembly: Assembly | None = None
    devices: set[str] = field(default_factory=set)

    @property
    def device(self) -> str | None:
        """The type of the device that quantized it: the CPU where that did a part of it."""
        return min(self.devices, key=lambda kind: kind != "cpu", default=None)


class Processor:
    """Casts and quantizes the slices of a component's tensors, one tensor after the other.

    Args:
        tensors: what happens to each.
        lanes: where weights are quantized.
        send: takes each message and the bytes that wait with it.
    """

    def __init__(self, tensors: Sequence[TensorPlan], lanes: Lanes, send: Send) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._lanes = lanes
        self._send = send
        self._under_way: deque[tuple[Slice, Pending | None]] = deque()
        self._work: _Work | None = None

    def take(self, piece: Slice) -> None:
        """Work on a slice; those of a tensor come in order.

        Raises:
            QuantizeError: NaN or infinity in a weight, or torchao failed on it.
            Closed: nobody takes the messages.
        """
        plan = self._tensors[piece.name]
        pending = None
        if plan.scheme is not None:
            pending = self._lanes.start(plan.name, piece.data, getattr(torch, plan.dtype), plan.scheme)
        self._under_way.append((piece, pending))
        while self._lanes.crowded([piece.data.nbytes if pending else None for piece, pending in self._under_way]):
            self._finish(*self._under_way.popleft())

    def flush(self) -> None:
        """Wait for all that is under way; as ``take``."""
        while self._under_way:
            self._finish(*self._under_way.popleft())

    def _finish(self, piece: Slice, pending: Pending | None) -> None:
        if self._work is None:
            plan = self._tensors[piece.name]
            streamed = is_streamed(plan)
            self._work = _Work(plan, streamed, ErrorStats() if plan.scheme is not None else None)
            if streamed:
                self._send(Begin(plan, self._like(plan)), 0)
        work = self._work
        rows, release = self._rows(piece, pending, work)
        if piece.start == 0 and piece.last and not work.streamed:
            self._send(Whole(work.plan, rows, work.error, work.device, release), work.plan.bytes_out)
        else:
            self._collect(work, piece, rows, release)
        if piece.last:
            self._work = None

    def _rows(self, piece: Slice, pending: Pending | None, work: _Work) -> tuple[torch.Tensor, Release]:
        """The slice as it will be stored. What is only copied stays where it was read until it is written."""
        if pending is None or work.error is None:
            rows = piece.data.to(getattr(torch, work.plan.dtype))
            if rows is piece.data:
                return rows, piece.release
            _check_overflow(work.plan, piece.data, rows)
        else:
            rows, figures, device = pending()
            work.error.merge(figures)
            work.devices.add(device)
        piece.release()
        return rows, nothing

    def _collect(self, work: _Work, piece: Slice, rows: torch.Tensor, release: Release) -> None:
        inner = {name: getattr(rows, name) for name in flatten(rows)[0]} if is_wrapper(rows) else {"": rows}
        first = next(iter(inner))
        assembly = work.assembly = work.assembly or Assembly(self._like(work.plan), work.plan.scheme)
        for name, part in inner.items():
            if work.streamed and name == first:
                self._send(Rows(work.plan, part, release), part.nbytes)
            else:
                assembly.put(name, part, piece.start, piece.stop - piece.start)
        if not work.streamed:
            release()
        if piece.last and work.streamed:
            self._send(End(work.plan, assembly.parts, work.error, work.device), 0)
        elif piece.last:
            self._send(Whole(work.plan, assembly.result(), work.error, work.device, nothing), work.plan.bytes_out)

    def _like(self, plan: TensorPlan) -> torch.Tensor:
        dtype = getattr(torch, plan.dtype)
        if plan.scheme is not None:
            return quantized_on_meta(plan.shape, dtype, plan.scheme)
        return torch.empty(plan.shape, dtype=dtype, device="meta")
