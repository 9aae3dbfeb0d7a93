"""One pass over a component's weights: what every candidate would make of every tensor, and how wrong that is.

A thread reads ahead, and each piece that was read is quantized to all candidates before the next: memory does not
depend on the model's size. Nothing of what torchao makes is kept.
"""

from __future__ import annotations

import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from aoconvert.engine.buffers import BufferPool
from aoconvert.engine.channel import Channel, Closed
from aoconvert.engine.device_streams import Lanes, open_devices
from aoconvert.engine.eager import threads
from aoconvert.engine.memory import steady_allocator
from aoconvert.engine.quantize_stage import Piece
from aoconvert.engine.read import ComponentReading
from aoconvert.environment import available_cores
from aoconvert.errors import DeviceError, QuantizeError
from aoconvert.formats.digest import Buffer, FileDigest, Mark
from aoconvert.kernels.checked import Kernels
from aoconvert.planning.needs import READ_AHEAD_BYTES
from aoconvert.planning.slices import BUFFERS, PER_DEVICE, SLICE_BYTES, slices
from aoconvert.planning.types import ComponentPlan, Plan, TensorPlan
from aoconvert.progress import Progress
from aoconvert.schemes.error_stats import ErrorStats

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

Figures = Callable[[], ErrorStats]
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


class _Unhashed(FileDigest):
    """The engine hashes the files when it reads them; it would be done twice."""

    def feed(self, offset: int, data: Buffer) -> None:
        pass

    def read_all(self) -> None:
        pass

    def mark(self, *, again: bool = False) -> Mark | None:
        return None


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
    ordered = [tensors[name] for name in plan.order if name in wanted]
    with _scratch(plan, whole) as scratch:
        digests = {path: _Unhashed(whole.source.local(path)) for path in plan.weights.files} if plan.weights else {}
        with ComponentReading(plan, whole, scratch, digests) as reading:
            return _Pass(ordered, wanted, reading, whole.devices, whole.allow_cpu, progress).run()


@contextmanager
def _scratch(plan: ComponentPlan, whole: Plan) -> Iterator[Path]:
    """A folder on the output's disk where transformers has to make a copy first; it is used for nothing else."""
    place = next(folder for folder in whole.output.resolve().parents if folder.exists())
    if plan.copied is None:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix=".aoconvert-search-", dir=place) as folder:
        yield Path(folder)


def _pieces(tensor: TensorPlan, schemes: Sequence[Scheme]) -> list[tuple[int, int]]:
    """The engine's pieces, in the largest unit; the whole tensor where one of the candidates takes it whole."""
    by_unit = sorted(schemes, key=lambda scheme: scheme.block(1), reverse=True)
    return min((slices(replace(tensor, scheme=scheme)) for scheme in by_unit), key=lambda pieces: len(pieces) > 1)


@dataclass
class _Pass:
    ordered: Sequence[TensorPlan]
    wanted: Mapping[str, Sequence[Scheme]]
    reading: ComponentReading
    devices: Sequence[str]
    allow_cpu: bool
    progress: Progress
    result: Measured = field(default_factory=Measured)
    failure: BaseException | None = None

    def run(self) -> Measured:
        self.devices = open_devices(self.devices, allow_cpu=self.allow_cpu)
        source: Channel[Piece] = Channel(READ_AHEAD_BYTES)
        on_gpu = self.devices[0] != "cpu"
        pool = BufferPool(SLICE_BYTES, BUFFERS + on_gpu * PER_DEVICE * len(self.devices), pinned=on_gpu)
        reader = threading.Thread(target=self._guarded, args=(source, pool), name="aoconvert-reader", daemon=True)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(max(1, available_cores() - 1))  # as in the engine: one core is the reader's
        reader.start()
        try:
            self._measure(source)
        except Closed:
            pass
        finally:
            torch.set_num_threads(threads_before)
            source.close()
            pool.close()
            reader.join()
        if self.failure is not None:
            raise self.failure
        return self.result

    def _guarded(self, out: Channel[Piece], pool: BufferPool) -> None:
        try:
            self._read(out, pool)
        except Closed:
            pass
        except BaseException as error:
            self.failure = error
            out.close()

    def _read(self, out: Channel[Piece], pool: BufferPool) -> None:
        for tensor in self.ordered:
            pieces = _pieces(tensor, self.wanted[tensor.name])
            for start, stop in pieces:
                nbytes = -(-tensor.bytes_in * (stop - start) // pieces[-1][1])
                buffer = pool.take(nbytes)
                if buffer is None:  # a giant: none is read while another waits
                    out.wait(nbytes)
                data = self.reading.read(tensor, None if len(pieces) == 1 else (start, stop), buffer)
                out.put(Piece(tensor, start, stop, data, partial(pool.give, buffer)), nbytes)
                del data  # or it would live until the next one is read
        out.end()

    def _measure(self, source: Channel[Piece]) -> None:
        to_quantize: Counter[str] = Counter()
        for tensor in self.ordered:
            for scheme in self.wanted[tensor.name]:
                to_quantize[scheme.key] += tensor.bytes_in
        with torch.no_grad(), Kernels(self.devices[0], to_quantize) as kernels, threads(available_cores()) as pool:
            lanes = Lanes(self.devices, kernels, self.allow_cpu, pool)
            under_way: deque[tuple[Piece, list[tuple[Scheme, Figures]]]] = deque()
            while (piece := source.get()) is not None:
                under_way.append((piece, self._start(lanes, piece)))
                del piece
                while lanes.crowded([piece.data.nbytes for piece, _ in under_way]):
                    self._finish(*under_way.popleft())
            while under_way:
                self._finish(*under_way.popleft())

    def _start(self, lanes: Lanes, piece: Piece) -> list[tuple[Scheme, Figures]]:
        plan = piece.plan
        errors = self.result.errors.setdefault(plan.name, {})
        if piece.start == 0:
            errors.update({scheme.key: ErrorStats() for scheme in self.wanted[plan.name]})
        begun: list[tuple[Scheme, Figures]] = []
        for scheme in self.wanted[plan.name]:
            if scheme.key not in errors:  # an earlier piece could not take it
                continue
            start = partial(lanes.measure, plan.name, piece.data, getattr(torch, plan.dtype), scheme)
            if (pending := self._tried(piece, scheme, start)) is not None:
                begun.append((scheme, pending))
        return begun

    def _finish(self, piece: Piece, begun: Sequence[tuple[Scheme, Figures]]) -> None:
        plan = piece.plan
        for scheme, pending in begun:
            figures = self._tried(piece, scheme, pending)
            if figures is not None and (error := self.result.errors[plan.name].get(scheme.key)) is not None:
                error.merge(figures)
        rows = plan.shape[0]
        done = plan.bytes_in * piece.stop // rows - plan.bytes_in * piece.start // rows
        piece.release()
        self.progress.advance(done, plan.name)

    def _tried(self, piece: Piece, scheme: Scheme, work: Callable[[], T]) -> T | None:
        """What ``work`` gives; ``None`` where torchao cannot do this with the tensor, which is noted.

        Raises:
            QuantizeError: the tensor is at fault.
        """
        plan = piece.plan
        try:
            return work()
        except DeviceError:
            raise
        except QuantizeError as error:
            if not bool(piece.data.to(getattr(torch, plan.dtype)).isfinite().all()):
                raise
            if self.result.errors[plan.name].pop(scheme.key, None) is not None:
                self.result.failures.append(f"auto leaves {scheme.name} out for {plan.name}: {error.message}")
            return None
