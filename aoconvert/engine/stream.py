"""Read → quantize → write, one tensor at a time, in three threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from aoconvert.engine.channel import Channel, Closed
from aoconvert.engine.quantize import quantize_tensor
from aoconvert.planning.make import READ_AHEAD_BYTES
from aoconvert.planning.types import ComponentPlan, TensorPlan
from aoconvert.progress import Progress
from aoconvert.writers.torch_bin import SealedFile, TorchBinWriter, WrittenTensor


class Reading(Protocol):
    """Gives one tensor of the plan in host memory, its own copy, in the source's dtype."""

    def read(self, tensor: TensorPlan) -> torch.Tensor:
        """The tensor's data; shape and dtype as the plan says."""


@dataclass(frozen=True)
class TensorResult:
    """What was written for one tensor of the plan."""

    written: WrittenTensor
    sqnr_db: float | None = None
    max_abs_error: float | None = None


@dataclass
class Seconds:
    """Time each stage was at work, waiting not counted."""

    reader: float = 0.0
    quantize: float = 0.0
    writer: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.reader + other.reader, self.quantize + other.quantize, self.writer + other.writer)


@dataclass(frozen=True)
class ComponentResult:
    """A component's tensors by name, its sealed files by output path, and where the time went."""

    tensors: Mapping[str, TensorResult]
    files: Mapping[str, SealedFile]
    seconds: Seconds


@dataclass(frozen=True)
class _Done:
    plan: TensorPlan
    tensor: torch.Tensor
    sqnr_db: float | None = None
    max_abs_error: float | None = None


def run_component(
    plan: ComponentPlan, reading: Reading, root: Path, device: str, progress: Progress
) -> ComponentResult:
    """Stream every tensor of a component into its files below ``root``.

    Bounded channels connect the stages, so memory does not depend on the model's size. The quantizer runs in the
    calling thread, which is the one that Ctrl-C reaches.

    Raises:
        AoconvertError: of whichever stage failed first; unfinished files are removed.
    """
    return _Stream(plan, reading, root, device, progress).run()


def available_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


@dataclass
class _Stream:
    plan: ComponentPlan
    reading: Reading
    root: Path
    device: str
    progress: Progress
    seconds: Seconds = field(default_factory=Seconds)
    failures: list[BaseException] = field(default_factory=list)
    tensors: dict[str, TensorResult] = field(default_factory=dict)
    files: dict[str, SealedFile] = field(default_factory=dict)

    def run(self) -> ComponentResult:
        source: Channel[tuple[TensorPlan, torch.Tensor]] = Channel(READ_AHEAD_BYTES)
        sink: Channel[_Done] = Channel(READ_AHEAD_BYTES)

        def guarded(work: Callable[[], None]) -> Callable[[], None]:
            def body() -> None:
                try:
                    work()
                except Closed:
                    pass
                except BaseException as error:
                    self.failures.append(error)
                    source.close()
                    sink.close()

            return body

        threads = [
            threading.Thread(target=guarded(lambda: self._read(source)), name="aoconvert-reader", daemon=True),
            threading.Thread(target=guarded(lambda: self._write(sink)), name="aoconvert-writer", daemon=True),
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
            source.close()
        finally:
            torch.set_num_threads(threads_before)
            if self.failures:
                sink.close()
            else:
                sink.end()
            for thread in threads:
                thread.join()
        if self.failures:
            raise self.failures[0]
        return ComponentResult(self.tensors, self.files, self.seconds)

    def _ordered(self) -> Iterator[TensorPlan]:
        plans = {tensor.name: tensor for tensor in self.plan.tensors}
        return (plans[name] for name in self.plan.order)

    def _read(self, out: Channel[tuple[TensorPlan, torch.Tensor]]) -> None:
        for tensor in self._ordered():
            began = time.perf_counter()
            data = self.reading.read(tensor)
            self.seconds.reader += time.perf_counter() - began
            out.put((tensor, data), tensor.bytes_in)
            del data  # or it would live until the next one is read
        out.end()

    def _quantize(self, source: Channel[tuple[TensorPlan, torch.Tensor]], out: Channel[_Done]) -> None:
        with torch.no_grad():
            while (item := source.get()) is not None:
                tensor, data = item
                began = time.perf_counter()
                done = self._process(tensor, data)
                self.seconds.quantize += time.perf_counter() - began
                del item, data
                out.put(done, tensor.bytes_out)
                del done

    def _process(self, tensor: TensorPlan, data: torch.Tensor) -> _Done:
        dtype = getattr(torch, tensor.dtype)
        if tensor.action != "quantize":
            return _Done(tensor, data.to(dtype))
        result = quantize_tensor(tensor.name, data, dtype, self.plan.scheme, self.device)
        return _Done(tensor, result.tensor, result.sqnr_db, result.max_abs_error)

    def _write(self, source: Channel[_Done]) -> None:
        """Tensors come file by file; a file is sealed when its last tensor has passed."""
        left: dict[str, int] = {}
        for tensor in self.plan.tensors:
            if tensor.file is not None:
                left[tensor.file] = left.get(tensor.file, 0) + 1
        writer: TorchBinWriter | None = None
        try:
            while (done := source.get()) is not None:
                path = done.plan.file
                assert path is not None
                began = time.perf_counter()
                if writer is None:
                    target = self.root / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    writer = TorchBinWriter(target)
                written = writer.add(done.plan.name, done.tensor)
                self.tensors[done.plan.name] = TensorResult(written, done.sqnr_db, done.max_abs_error)
                left[path] -= 1
                if not left[path]:
                    order = [tensor.name for tensor in self.plan.tensors if tensor.file == path]
                    self.files[path] = writer.seal(order)
                    writer = None
                self.seconds.writer += time.perf_counter() - began
                self.progress.advance(done.plan.bytes_in, done.plan.name)
                del done
        finally:
            if writer is not None:
                writer.abort()
