"""Where slices are quantized: in the calling thread on a CPU; on GPUs two at a time each, copies beside arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple

from aoconvert import accelerators
from aoconvert.engine.acceleration import KernelSource
from aoconvert.engine.assembly import Part
from aoconvert.engine.block_quantizer import BlockQuantizer, WeightSlice
from aoconvert.engine.blocks import block_rows, matrix_shape
from aoconvert.errors import DeviceError, DeviceMemoryError
from aoconvert.planning.slices import BUFFERS, PER_DEVICE, SLICE_BYTES
from aoconvert.schemes.error_stats import ErrorStats

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

_log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """The error of a slice that was quantized, and the type of the device that did it."""

    error: ErrorStats
    device: str


Pending = Callable[[], Outcome]


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


class Quantizer:
    """Quantizes slices on ``devices``, each on the one that has had the fewest bytes.

    Args:
        devices: ``("cpu",)``, or GPUs, as :func:`open_devices` returned them.
        kernels: compiled arithmetic for the CPU.
        allow_cpu: what does not fit a GPU's memory is done on the CPU; otherwise it is an error.
        pool: threads for what is done on the CPU without a kernel.
    """

    def __init__(
        self, devices: Sequence[str], kernels: KernelSource, allow_cpu: bool = False, pool: Executor | None = None
    ) -> None:
        on_gpu = devices[0] != "cpu"
        self._cpu = BlockQuantizer("cpu", kernels, pool)
        self._gpus = [BlockQuantizer(device) for device in devices for _ in range(PER_DEVICE)] if on_gpu else []
        self._allow_cpu = allow_cpu

    def crowded(self, under_way: Sequence[int | None]) -> bool:
        """Whether the first of the slices under way has to be waited for before the next is begun.

        Each GPU has its slices, and the reader a buffer; slices that are larger than a buffer do not pile up.

        Args:
            under_way: bytes of each slice that is quantized, ``None`` for those that are not.
        """
        depth = len(self._gpus)
        if not depth:
            return bool(under_way)
        weights = [nbytes for nbytes in under_way if nbytes is not None]
        many = len(weights) > depth or len(under_way) >= depth + BUFFERS
        return many or sum(weights) > depth * SLICE_BYTES

    def takes_page_locked(self, scheme: Scheme) -> bool:
        """Whether results come from a GPU, to be copied into page-locked memory."""
        return bool(self._gpus) and not scheme.cpu_only

    def start(self, rows: WeightSlice, into: Part | None) -> Pending:
        """Begin to quantize a slice; the result is to be asked for in the order of the calls.

        Args:
            rows: the slice; its data must stay as it is until then.
            into: where the result goes; ``None``: only its error is wanted, and nothing is copied back from a GPU.

        Raises:
            QuantizeError: NaN or infinity in the weight, or torchao failed on it; by the result as well.
            DeviceError: a GPU has no memory left, or failed; by the result as well.
        """
        chosen = self._choose(rows)
        if chosen is None or (finish := self._fit(chosen, rows, into)) is None:
            chosen, finish = self._cpu, self._cpu.start(rows, into)

        def wait() -> Outcome:
            error = finish()
            if not error.finite:  # rows of zeros are repaired in the result, which is not here; anything else is named
                return Outcome(self._cpu.start(rows, None)(), self._cpu.device.type)
            return Outcome(error, chosen.device.type)

        return wait

    def _choose(self, rows: WeightSlice) -> BlockQuantizer | None:
        if not self._gpus or rows.scheme.cpu_only:
            return None
        chosen = min(self._gpus, key=lambda gpu: gpu.bytes)
        chosen.bytes += rows.data.nbytes
        return chosen

    def _fit(self, gpu: BlockQuantizer, rows: WeightSlice, into: Part | None) -> Callable[[], ErrorStats] | None:
        """Begin in blocks that fit the GPU's memory; ``None``: the CPU's turn.

        Raises:
            DeviceMemoryError: not even the smallest blocks fit, and the CPU may not take them.
        """
        for elements in _smaller_and_smaller(rows, gpu.block_elements):
            try:
                return gpu.start(rows, into, elements)
            except RuntimeError as failure:
                if not accelerators.is_full(failure):
                    raise
            gpu.clear()  # not before: the error holds the failed attempt's tensors
        if not self._allow_cpu:
            raise DeviceMemoryError(
                f"{gpu.device} has no memory left for {rows.name}",
                hint="free the GPU, or use --device auto, which quantizes what does not fit on the CPU",
            )
        _log.warning("%s has no memory left for %s: it is quantized on the CPU", gpu.device, rows.name)
        return None


def _smaller_and_smaller(rows: WeightSlice, elements: int) -> Iterator[int]:
    """Values of a block, each time for fewer rows than before, as far as the scheme allows that."""
    _, shape = matrix_shape(tuple(rows.data.shape), rows.scheme)
    before = shape[0] + 1
    while elements:
        if (step := block_rows(shape, rows.scheme, elements)) < before:
            yield elements
            before = step
        elements //= 8
