"""Where pieces are quantized: in the calling thread on a CPU; on GPUs two at a time each, copies beside arithmetic."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from aoconvert import accelerators
from aoconvert.engine.acceleration import KernelSource
from aoconvert.engine.assembly import Assembly, quantized_on_meta
from aoconvert.engine.blocks import Blocks, cut, quantize_block, torchao_at_work
from aoconvert.engine.quantize import not_finite, quantize_rows
from aoconvert.errors import DeviceError, DeviceMemoryError
from aoconvert.planning.slices import BUFFERS, DEVICE_BLOCK, PER_DEVICE, SLICE_BYTES
from aoconvert.schemes.error_stats import ErrorStats, differences, squares
from aoconvert.schemes.tensors import repair

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

_log = logging.getLogger(__name__)
T = TypeVar("T")


class PieceResult(NamedTuple):
    """Rows that were quantized, in host memory, their figures, and the type of the device that did it."""

    tensor: torch.Tensor
    error: ErrorStats
    device: str


Pending = Callable[[], PieceResult]


def open_devices(devices: Sequence[str], *, allow_cpu: bool) -> tuple[str, ...]:
    """Use each device once, before other threads page-lock memory: torch does that in the context of a device that
    has one, and makes one on device 0 where none has.

    Args:
        devices: ``("cpu",)``, or GPUs.
        allow_cpu: the CPU takes the place of what cannot be used; otherwise it is an error.

    Raises:
        DeviceError: a GPU is full, taken, or lacks what is needed.
    """
    if devices[0] == "cpu":
        return tuple(devices)
    failures = {device: why for device in devices if (why := accelerators.failure(device)) is not None}
    for device, why in failures.items():
        if not allow_cpu:
            raise DeviceError(
                f"{device} cannot be used: {why}",
                hint="free it, choose another, or use --device auto, which falls back to the CPU",
            )
        _log.warning("%s cannot be used: %s", device, why)
    return tuple(device for device in devices if device not in failures) or ("cpu",)


@dataclass
class Lanes:
    """Quantizes pieces of rows on ``devices``, each on the one that has had the fewest bytes.

    Args:
        devices: ``("cpu",)``, or GPUs, as :func:`open_devices` returned them.
        kernels: compiled arithmetic for the CPU.
        allow_cpu: what does not fit a GPU's memory is done on the CPU; otherwise it is an error.
        pool: threads for what is done on the CPU without a kernel.
    """

    devices: Sequence[str]
    kernels: KernelSource
    allow_cpu: bool = False
    pool: Executor | None = None
    _lanes: list[Lane] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.devices[0] != "cpu":
            self._lanes = [Lane(device) for device in self.devices for _ in range(PER_DEVICE)]

    def crowded(self, under_way: Sequence[int | None]) -> bool:
        """Whether the first of the pieces under way has to be waited for before the next is begun.

        Each lane has its piece, and the reader a buffer; pieces that are larger than a buffer do not pile up.

        Args:
            under_way: bytes of each piece that is quantized, ``None`` for those that are not.
        """
        if not self.depth:
            return bool(under_way)
        weights = [nbytes for nbytes in under_way if nbytes is not None]
        many = len(weights) > self.depth or len(under_way) >= self.depth + BUFFERS
        return many or sum(weights) > self.depth * SLICE_BYTES

    @property
    def depth(self) -> int:
        """How many pieces can be worked on at once; 0 on a CPU, where each is done when it has begun."""
        return len(self._lanes)

    def start(self, name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> Pending:
        """Begin with rows of a weight; the result is to be asked for in the order of the calls.

        ``data`` must stay as it is until then.

        Raises:
            QuantizeError: NaN or infinity in the weight, or torchao failed on it.
            DeviceError: a GPU has no memory left, or failed.
        """
        begun = self._begun(
            name, data, scheme, lambda lane, blocks: (lane, lane.start(name, data, dtype, scheme, blocks))
        )
        if begun is None:
            outcome = self._on_cpu(name, data, dtype, scheme)
            return lambda: outcome
        lane, finish = begun
        return lambda: PieceResult(*finish(), lane.device.type)

    def measure(self, name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> Callable[[], ErrorStats]:
        """As ``start``, for the figures alone: what torchao makes is not copied back."""
        begun = self._begun(name, data, scheme, lambda lane, blocks: lane.measure(name, data, dtype, scheme, blocks))
        if begun is None:
            done = self._on_cpu(name, data, dtype, scheme).error
            return lambda: done

        def wait() -> ErrorStats:
            error = begun()
            # rows of zeros are repaired in the result, which is not here; anything else is named
            return error if error.finite else self._on_cpu(name, data, dtype, scheme).error

        return wait

    def _begun(self, name: str, data: torch.Tensor, scheme: Scheme, begin: Callable[[Lane, Blocks], T]) -> T | None:
        """What ``begin`` gives for the next lane, in blocks that fit its memory; ``None``: the CPU's turn.

        Raises:
            DeviceMemoryError: not even the smallest blocks fit, and the CPU may not take them.
        """
        if not self._lanes or scheme.cpu_only:
            return None
        lane = min(self._lanes, key=lambda lane: lane.bytes)
        lane.bytes += data.nbytes
        for blocks in _smaller_and_smaller(data, scheme):
            try:
                return begin(lane, blocks)
            except RuntimeError as failure:
                if not accelerators.is_full(failure):
                    raise
            lane.clear()  # not before: the error holds the failed attempt's tensors
        if not self.allow_cpu:
            raise DeviceMemoryError(
                f"{lane.device} has no memory left for {name}",
                hint="free the GPU, or use --device auto, which quantizes what does not fit on the CPU",
            )
        _log.warning("%s has no memory left for %s: it is quantized on the CPU", lane.device, name)
        return None

    def _on_cpu(self, name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> PieceResult:
        error = ErrorStats()
        kernel = self.kernels.for_tensor(scheme, data.dtype, dtype)
        rows = quantize_rows(name, data, dtype, scheme, "cpu", error, kernel=kernel, pool=self.pool)
        return PieceResult(rows, error, "cpu")


def _smaller_and_smaller(data: torch.Tensor, scheme: Scheme) -> Iterator[Blocks]:
    """Ways to cut a weight, each into smaller blocks than the one before, as far as its scheme allows that."""
    elements, before = DEVICE_BLOCK, len(data) + 1
    while elements:
        blocks = cut(data, scheme, elements)
        if (rows := min(blocks.step, len(data))) < before:
            yield blocks
            before = rows
        elements //= 8


class Lane:
    """A stream of a GPU: what is started on it runs in order, beside the other lanes.

    On ``cpu`` everything is done at once; tests compare that with the usual way.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self._stream = accelerators.new_stream(self.device) if self.device.type != "cpu" else None

    def start(
        self, name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme, blocks: Blocks
    ) -> Callable[[], tuple[torch.Tensor, ErrorStats]]:
        """Copy rows to the device, quantize them there block by block, and copy the result back.

        What is returned waits for it, and repairs rows of zeros in the result.

        Raises:
            QuantizeError: torchao failed.
            DeviceError: the device failed.
            RuntimeError: the device is full (:func:`aoconvert.accelerators.is_full`).
        """
        with torchao_at_work(name, scheme):
            assembly = Assembly(quantized_on_meta(data.shape, dtype, scheme), scheme, self._stream is not None)
        figures = self._run(name, data, dtype, scheme, blocks, assembly)

        def wait() -> tuple[torch.Tensor, ErrorStats]:
            error, result = figures(), assembly.result()
            return result, error if error.finite else _repaired(name, data, dtype, scheme, result, error)

        return wait

    def measure(
        self, name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme, blocks: Blocks
    ) -> Callable[[], ErrorStats]:
        """As ``start``, for the figures alone, which rows of zeros may make NaN."""
        return self._run(name, data, dtype, scheme, blocks, None)

    def _run(
        self,
        name: str,
        data: torch.Tensor,
        dtype: torch.dtype,
        scheme: Scheme,
        blocks: Blocks,
        assembly: Assembly | None,
    ) -> Callable[[], ErrorStats]:
        # what is copied from stays until it has been waited for, as it is: no temporary that nobody holds
        data, near = data.contiguous(), blocks.to("cpu", dtype)
        with self._failing(), self._current():
            blocks = near.to(self.device, dtype)
            figures = torch.zeros(3, dtype=torch.float64, device=self.device)
            for start in range(0, len(data), blocks.step):
                original = data[start : start + blocks.step].to(self.device, non_blocking=True)
                with torchao_at_work(name, scheme):
                    block, ahead = blocks.completed(original.to(dtype))
                    quantized = quantize_block(name, block, scheme)
                    _count(figures, original, quantized, ahead)
                if assembly is not None:
                    assembly.put_all(quantized, start, len(original), ahead)
            host = self._host_figures(figures)
            done = self._stream.record_event() if self._stream is not None else None

        def wait(_: object = (data, near)) -> ErrorStats:
            if done is not None:
                with self._failing():
                    done.synchronize()
            return ErrorStats(*host.tolist())

        return wait

    def _host_figures(self, figures: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return figures
        return accelerators.page_locked((3,), (1,), figures.dtype).copy_(figures, non_blocking=True)

    def clear(self) -> None:
        """Give back what torch keeps of the device's memory for this process."""
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


def _count(figures: torch.Tensor, original: torch.Tensor, quantized: torch.Tensor, ahead: int) -> None:
    """As ``ErrorStats.add``, with the sums left on the device: reading one would wait for it."""
    for weight, difference in differences(original, quantized, ahead):
        figures[0] += squares(weight)
        figures[1] += squares(difference)
        figures[2] = torch.maximum(figures[2], difference.abs().amax().to(torch.float64))


def _repaired(
    name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme, result: torch.Tensor, error: ErrorStats
) -> ErrorStats:
    """Repair rows of zeros that have become NaN, in place, and measure again; on the host, which has memory for it.

    Raises:
        QuantizeError: NaN or infinity that comes from elsewhere.
    """
    if math.isfinite(error.signal) and (rows := repair(result)):
        error = ErrorStats(repaired=rows)
        error.add(data, result)
    if not error.finite:
        raise not_finite(name, data, dtype, error, scheme)
    return error
