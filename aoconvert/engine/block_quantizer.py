"""The one loop over the blocks of a weight; devices differ in where blocks are copied, and in who waits for what."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from aoconvert import accelerators
from aoconvert.engine.acceleration import KernelSource, NoKernels
from aoconvert.engine.assembly import Part
from aoconvert.engine.blocks import Blocks, cut, matrix_shape, torchao_at_work
from aoconvert.errors import DeviceError, QuantizeError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.planning.slices import CPU_BLOCK, DEVICE_BLOCK, at_once
from aoconvert.schemes.apply import quantize_weight
from aoconvert.schemes.error_stats import ErrorStats, error_figures
from aoconvert.schemes.tensors import repair

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

# Figures of a block (error_figures), and how many rows of zeros were repaired in it
_Made = tuple[torch.Tensor, int]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class WeightSlice:
    """Rows of a weight, to be quantized.

    Attributes:
        name: the weight's, for messages.
        data: (rows, in_features) or (experts, rows, in_features), floating, in host memory, as in the source.
        dtype: base dtype; the rows are cast to it before they are quantized.
        scheme: what to quantize them to.
    """

    name: str
    data: torch.Tensor
    dtype: torch.dtype
    scheme: Scheme


def threads(count: int) -> ThreadPoolExecutor:
    """Threads that work on a block each, with no threads of torch's below them; they start when they are wanted."""
    return ThreadPoolExecutor(count, thread_name_prefix="aoconvert-block", initializer=lambda: torch.set_num_threads(1))


class BlockQuantizer:
    """Quantizes slices on one device, block of rows by block of rows.

    What is begun on a GPU runs in order, in a stream of its own, beside the other quantizers' work and the caller's. On
    a CPU it is done at once, several blocks at a time, or by a compiled kernel.

    Args:
        device: where the arithmetic runs.
        kernels: compiled arithmetic, for the CPU.
        pool: threads for several blocks at a time on the CPU; one after the other without.

    Attributes:
        bytes: of the source, that were given to it; for whoever shares out the work.
    """

    def __init__(self, device: str, kernels: KernelSource | None = None, pool: Executor | None = None) -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self._stream = accelerators.new_stream(self.device) if self.device.type != "cpu" else None
        self._kernels = kernels or NoKernels()
        self._pool = pool

    @property
    def block_elements(self) -> int:
        """Values of a block, as far as the scheme allows it."""
        return CPU_BLOCK if self._stream is None else DEVICE_BLOCK

    def start(self, rows: WeightSlice, into: Part | None, elements: int | None = None) -> Callable[[], ErrorStats]:
        """Begin to quantize a slice.

        Args:
            rows: the slice; its data has to stay as it is until the result is there.
            into: where the result goes; ``None``: only its error is wanted.
            elements: values of a block; those of the device by default.

        Returns:
            Waits for the result, repairs rows of zeros in it, and gives its error. Without ``into`` the error on a GPU
            counts such rows, as NaN. It raises a QuantizeError for NaN or infinity that comes from elsewhere.

        Raises:
            QuantizeError: torchao failed.
            DeviceError: the device failed.
            RuntimeError: the device is full (:func:`aoconvert.accelerators.is_full`).
        """
        data = rows.data.contiguous()
        count, shape = matrix_shape(tuple(data.shape), rows.scheme)
        matrices = data.view(count, *shape)
        if count == 1 and (error := self._quantize_by_kernel(rows, matrices[0], into)) is not None:
            return lambda: error
        # what is copied from stays until it has been waited for, as it is: no temporary that nobody holds
        held: list[object] = [data]
        figures: list[torch.Tensor] = []
        repaired = 0
        with self._failing(), self._current():
            for at, matrix in enumerate(matrices):
                near = cut(matrix, rows.scheme, elements or self.block_elements).to("cpu", rows.dtype)
                held.append(near)
                put = None if into is None else partial(into.put, matrix=at)
                which = f"{f'[{at}]' if count > 1 else ''} {list(shape)}"
                work = partial(self._block, rows, which, matrix, near.to(self.device, rows.dtype), put)
                made = list(self._each(work, matrix, near.step, rows.scheme))
                figures += [each for each, _ in made]
                # every block of a weight with one scale has found the same one missing
                repaired += (max if rows.scheme.rows.shared_scale else sum)(lost for _, lost in made)
            host = self._fetch(_total(figures))
            done = self._stream.record_event() if self._stream is not None else None

        def finish(_: object = held) -> ErrorStats:
            if done is not None:
                with self._failing():
                    done.synchronize()
            found, lost = host, repaired
            if done is not None and into is not None:
                found, lost = _mend(data, into.result(), 0, host)
            signal, noise, largest = found.tolist()
            error = ErrorStats(signal, noise, largest, lost)
            if not error.finite and (done is None or into is not None):
                raise _not_finite(rows, error)
            return error

        return finish

    def _quantize_by_kernel(self, rows: WeightSlice, matrix: torch.Tensor, into: Part | None) -> ErrorStats | None:
        kernel = self._kernels.for_tensor(rows.scheme, rows.data.dtype, rows.dtype)
        done = kernel.quantize(matrix) if kernel is not None else None
        if done is None:
            return None
        quantized, error = done
        if into is not None:
            into.put(quantized, 0, len(quantized))
        return error

    def _each(self, work: Callable[[int], _Made], matrix: torch.Tensor, step: int, scheme: Scheme) -> Iterable[_Made]:
        starts = range(0, len(matrix), step)
        if self._pool is None or len(starts) == 1:
            return map(work, starts)
        return _in_order(self._pool, work, starts, at_once(scheme, matrix.shape[1]))

    def _block(
        self,
        rows: WeightSlice,
        which: str,
        matrix: torch.Tensor,
        blocks: Blocks,
        put: Callable[..., None] | None,
        start: int,
    ) -> _Made:
        original = matrix[start : start + blocks.step].to(self.device, non_blocking=True)
        with torch.no_grad(), torchao_at_work(rows.name, rows.scheme, which):
            block, ahead = blocks.complete(original.to(rows.dtype))
            quantized = quantize_weight(block, rows.scheme)
            if not hasattr(quantized, "__tensor_flatten__"):
                hint = f"--skip {rows.name}"
                raise QuantizeError(f"torchao left {rows.name} unquantized under {rows.scheme.name}", hint=hint)
            figures, repaired = error_figures(original, quantized, ahead), 0
            if self._stream is None:  # on a GPU a look at them would wait for them
                figures, repaired = _mend(original, quantized, ahead, figures)
        if put is not None:
            put(quantized, start, len(original), ahead)
        return figures, repaired

    def _fetch(self, figures: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return figures
        return accelerators.page_locked((3,), (1,), figures.dtype).copy_(figures, non_blocking=True)

    def clear(self) -> None:
        """Give back what torch keeps of the device's memory for this process, when all that was begun is done."""
        if self._stream is not None:
            accelerators.give_back(self.device)

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        return self._stream if self._stream is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A GPU's own failure is nobody's weight's; that it is full, somebody else deals with."""
        try:
            yield
        except torch.AcceleratorError as error:
            if accelerators.is_full(error):
                raise
            raise DeviceError(
                f"{self.device} failed: {error}".splitlines()[0], hint="check its driver (nvidia-smi, xpu-smi)"
            ) from error


def _total(figures: Sequence[torch.Tensor]) -> torch.Tensor:
    """The figures of several blocks together, on their device."""
    stacked = torch.stack(list(figures))
    return torch.cat([stacked[:, :2].sum(0), stacked[:, 2:].amax(0)])


def _mend(original: torch.Tensor, quantized: torch.Tensor, ahead: int, figures: torch.Tensor) -> _Made:
    """Repair rows of zeros that have become NaN, in place, and measure again; in host memory."""
    signal, noise, _ = figures.tolist()
    if math.isfinite(signal) and not math.isfinite(noise) and (rows := repair(quantized)):
        return error_figures(original, quantized, ahead), rows
    return figures, 0


def _not_finite(rows: WeightSlice, error: ErrorStats) -> QuantizeError:
    """Say where the NaN or infinity comes from: the source, the cast, or the scheme."""
    name, scheme = rows.name, rows.scheme.name
    if not math.isfinite(error.signal):
        return QuantizeError(
            f"{name} holds NaN or infinity", hint="repair the source, or leave this tensor unquantized with --skip"
        )
    if not bool(rows.data.to(rows.dtype).isfinite().all()):
        return QuantizeError(f"{name} overflows {dtype_name(rows.dtype)}", hint="choose --dtype bfloat16")
    other = ", or choose int8wo" if scheme != "int8wo" else ""
    return QuantizeError(f"{name}: {scheme} turns it into NaN or infinity", hint=f"--skip {name}{other}")


def _in_order(pool: Executor, work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """What ``work`` makes of each, in order, with no more than ``most`` under way or waiting to be taken."""
    under_way: deque[Future[R]] = deque()
    try:
        for item in items:
            if len(under_way) >= most:
                yield under_way.popleft().result()
            under_way.append(pool.submit(work, item))
        while under_way:
            yield under_way.popleft().result()
    finally:  # nobody looks at the weight any more when this is left
        for future in under_way:
            future.cancel()
        wait(under_way)
