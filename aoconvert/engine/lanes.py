"""Where pieces are quantized: in the calling thread on a CPU; on GPUs two at a time each, copies beside arithmetic."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from aoconvert.engine.assembly import Assembly
from aoconvert.engine.blocks import Blocks, cut
from aoconvert.engine.figures import Error, differences, squares
from aoconvert.engine.kernels import Kernels
from aoconvert.engine.quantize import quantize_rows
from aoconvert.errors import DeviceMemoryError, QuantizeError
from aoconvert.schemes.apply import quantize_weight

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

_log = logging.getLogger(__name__)

PER_DEVICE = 2
"""Pieces on a GPU at once: while one is worked on, another is copied."""

# Elements of a block of rows: torchao's temporaries take about 24 bytes of each
DEVICE_BLOCK = 1 << 22

Outcome = tuple[torch.Tensor, Error]
Pending = Callable[[], Outcome]


@dataclass
class Lanes:
    """Quantizes pieces of rows on ``devices``, each on the one that has had the fewest bytes.

    Args:
        devices: ``("cpu",)``, or GPUs.
        kernels: compiled arithmetic for the CPU.
        allow_cpu: what does not fit a GPU's memory is done on the CPU; otherwise it is an error.
        pool: threads for what is done on the CPU without a kernel.
    """

    devices: Sequence[str]
    kernels: Kernels
    allow_cpu: bool = False
    pool: Executor | None = None
    _lanes: list[Lane] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.devices[0] != "cpu":
            self._lanes = [Lane(device) for device in self.devices for _ in range(PER_DEVICE)]

    @property
    def depth(self) -> int:
        """How many pieces should be under way before the first is waited for."""
        return len(self._lanes)

    def start(self, name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> Pending:
        """Begin with rows of a weight; the result is to be asked for in the order of the calls.

        ``data`` must stay as it is until then.
        """
        if not self._lanes:
            outcome = self._on_cpu(name, data, dtype, scheme)
            return lambda: outcome
        lane = min(self._lanes, key=lambda lane: lane.bytes)
        lane.bytes += data.nbytes
        elements = DEVICE_BLOCK
        while True:
            blocks = cut(data, scheme, elements)
            try:
                return lane.start(name, data, dtype, scheme, blocks)
            except torch.OutOfMemoryError:
                lane.clear()
                elements //= 8
                if elements and cut(data, scheme, elements).step < blocks.step:
                    continue
            if not self.allow_cpu:
                raise DeviceMemoryError(
                    f"{lane.device} has no memory left for {name}",
                    hint="free the GPU, or let what does not fit go to the CPU with --device auto",
                )
            _log.warning("%s has no memory left for %s: it is quantized on the CPU", lane.device, name)
            outcome = self._on_cpu(name, data, dtype, scheme)
            return lambda: outcome

    def _on_cpu(self, name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme) -> Outcome:
        error = Error()
        kernel = self.kernels.for_tensor(scheme, data.dtype, dtype)
        return quantize_rows(name, data, dtype, scheme, "cpu", error, kernel=kernel, pool=self.pool), error


class Lane:
    """A stream of a GPU: what is started on it runs in order, beside the other lanes.

    On ``cpu`` everything is done at once; tests compare that with the usual way.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self._stream: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned = self._stream is not None

    def start(self, name: str, data: torch.Tensor, dtype: torch.dtype, scheme: Scheme, blocks: Blocks) -> Pending:
        """Copy rows to the device, quantize them there block by block, and copy the result back.

        Raises:
            torch.OutOfMemoryError: the device is full.
            QuantizeError: torchao failed.
        """
        assembly = None
        with self._current():
            figures = torch.zeros(3, dtype=torch.float64, device=self.device)
            for start in range(0, len(data), blocks.step):
                original = data[start : start + blocks.step].to(self.device, non_blocking=True)
                try:
                    block, ahead = blocks.completed(original.to(dtype))
                    quantized = quantize_weight(block, scheme)
                except torch.OutOfMemoryError:
                    raise
                except Exception as failure:  # torchao raises whatever its handlers raise
                    raise QuantizeError(
                        f"{name}: {scheme.name} failed: {failure}".splitlines()[0], hint=f"--skip {name}"
                    ) from failure
                _count(figures, original, quantized, ahead)
                if assembly is None:
                    like = quantize_weight(data.to("meta", dtype), scheme)
                    assembly = Assembly(like, scheme, self._pinned)
                assembly.put_all(quantized, start, len(original), ahead)
            host = torch.empty(3, dtype=torch.float64, pin_memory=self._pinned).copy_(figures, non_blocking=True)
            done = self._stream.record_event() if self._stream is not None else None

        def wait() -> Outcome:
            if done is not None:
                done.synchronize()
            signal, noise, largest = host.tolist()
            error = Error(signal, noise, largest)
            if not error.finite:  # again, block by block: rows of zeros are repaired, and anything else is named
                error = Error()
                return quantize_rows(name, data, dtype, scheme, str(self.device), error), error
            assert assembly is not None
            return assembly.result(), error

        return wait

    def clear(self) -> None:
        """Give back what the device keeps for this process."""
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.empty_cache()

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()


def _count(figures: torch.Tensor, original: torch.Tensor, quantized: torch.Tensor, ahead: int) -> None:
    """As ``Error.add``, with the sums left on the device: reading one would wait for it."""
    for weight, difference in differences(original, quantized, ahead):
        figures[0] += squares(weight)
        figures[1] += squares(difference)
        figures[2] = torch.maximum(figures[2], difference.abs().amax().to(torch.float64))
