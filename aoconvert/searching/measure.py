"""One pass over a component's weights: what every candidate would make of every tensor, and how wrong that is.

A thread reads ahead, and each piece that was read is quantized to all candidates before the next: memory does not
depend on the model's size. Nothing of what torchao makes is kept.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from aoconvert.engine.block_quantizer import WeightSlice
from aoconvert.engine.channel import Stages
from aoconvert.engine.memory import steady_allocator
from aoconvert.engine.quantizer import Pending, Quantizer
from aoconvert.engine.read import ComponentReading
from aoconvert.engine.read_ahead import Slice
from aoconvert.engine.stream import stream
from aoconvert.errors import DeviceError, QuantizeError
from aoconvert.planning.types import ComponentPlan, Plan, TensorPlan
from aoconvert.progress import Progress
from aoconvert.schemes.error_stats import ErrorStats

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

T = TypeVar("T")


@dataclass
class Measured:
    """What came out.

    Attributes:
        errors: tensor → candidate's key → its error against the source's weight.
        failures: one line for each candidate that a tensor could not take, though its shape allows it.
    """

    errors: dict[str, dict[str, ErrorStats]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def measure(whole: Plan, plan: ComponentPlan, wanted: Mapping[str, Sequence[Scheme]], progress: Progress) -> Measured:
    """Measure the candidates for the tensors of a component.

    Args:
        whole: the plan, its source's files local.
        plan: the component.
        wanted: tensor → the candidates that its shape allows.
        progress: is told what is done.

    Raises:
        QuantizeError: NaN or infinity in a weight, or one that overflows in its new dtype.
        ReadError: a disk error.
        SourceError: transformers refuses the checkpoint.
    """
    steady_allocator()
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    candidates = {
        name: [replace(tensors[name], scheme=scheme) for scheme in wanted[name]]
        for name in plan.order
        if name in wanted
    }
    measuring = Measuring(candidates, progress)
    # the engine hashes the files when it reads them: it would be done twice
    with _scratch(plan, whole) as scratch, ComponentReading(plan, whole, scratch, hashed=False) as reading:
        stream(reading, [measuring], whole.devices, allow_cpu=whole.allow_cpu)
    return measuring.result


@contextmanager
def _scratch(plan: ComponentPlan, whole: Plan) -> Iterator[Path]:
    """A folder on the output's disk where transformers has to make a copy first; it is used for nothing else."""
    place = next(folder for folder in whole.output.resolve().parents if folder.exists())
    if plan.copied is None:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix=".aoconvert-search-", dir=place) as folder:
        yield Path(folder)


class Measuring:
    """A consumer that quantizes each slice to every candidate, and keeps the errors alone."""

    def __init__(self, wanted: Mapping[str, Sequence[TensorPlan]], progress: Progress) -> None:
        self.wanted = wanted
        self.result = Measured()
        self._progress = progress
        self._under_way: deque[tuple[Slice, list[tuple[Scheme, Pending]]]] = deque()

    def open(self, quantizer: Quantizer, _: Stages) -> None:
        """Quantize with it."""
        self._quantizer = quantizer

    def take(self, piece: Slice) -> None:
        """Quantize it to every candidate.

        Raises:
            QuantizeError: the tensor is at fault.
        """
        self._under_way.append((piece, self._start(piece)))
        while self._quantizer.crowded([piece.data.nbytes for piece, _ in self._under_way]):
            self._finish(*self._under_way.popleft())

    def finish(self) -> None:
        """Wait for all that is under way; as ``take``."""
        while self._under_way:
            self._finish(*self._under_way.popleft())

    def _start(self, piece: Slice) -> list[tuple[Scheme, Pending]]:
        plans = self.wanted[piece.name]
        schemes = [plan.scheme for plan in plans if plan.scheme is not None]
        errors = self.result.errors.setdefault(piece.name, {})
        if piece.start == 0:
            errors.update({scheme.key: ErrorStats() for scheme in schemes})
        begun: list[tuple[Scheme, Pending]] = []
        for scheme in schemes:
            if scheme.key not in errors:  # an earlier slice could not take it
                continue
            rows = WeightSlice(piece.name, piece.data, getattr(torch, plans[0].dtype), scheme)
            start = partial(self._quantizer.start, rows, None)
            if (pending := self._try(piece, scheme, start)) is not None:
                begun.append((scheme, pending))
        return begun

    def _finish(self, piece: Slice, begun: Sequence[tuple[Scheme, Pending]]) -> None:
        for scheme, pending in begun:
            outcome = self._try(piece, scheme, pending)
            if outcome is not None and (error := self.result.errors[piece.name].get(scheme.key)) is not None:
                error.merge(outcome.error)
        plan = self.wanted[piece.name][0]
        rows = plan.shape[0]
        done = plan.bytes_in * piece.stop // rows - plan.bytes_in * piece.start // rows
        piece.release()
        self._progress.advance(done, piece.name)

    def _try(self, piece: Slice, scheme: Scheme, work: Callable[[], T]) -> T | None:
        """What ``work`` gives; ``None`` where torchao cannot do this with the tensor, which is noted.

        Raises:
            QuantizeError: the tensor is at fault.
        """
        dtype = getattr(torch, self.wanted[piece.name][0].dtype)
        try:
            return work()
        except DeviceError:
            raise
        except QuantizeError as error:
            if not bool(piece.data.to(dtype).isfinite().all()):
                raise
            if self.result.errors[piece.name].pop(scheme.key, None) is not None:
                self.result.failures.append(f"auto does not consider {scheme.name} for {piece.name}: {error.message}")
            return None
