"""What a run will take: bytes on disk, and the peaks of host and device memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from aoconvert.planning.slices import (
    BUFFERS,
    BYTES_PER_VALUE,
    CPU_BLOCK,
    DEVICE_BLOCK,
    PER_DEVICE,
    SLICE_BYTES,
    at_once,
    is_streamed,
    slices,
)
from aoconvert.planning.types import ComponentPlan, CopyPlan, Needs, StreamedPlan, TensorPlan, UnquantizedPlan

READ_AHEAD_BYTES = SLICE_BYTES
"""Most bytes that wait between two stages; a single larger tensor may."""

# Measured: the process with torch, torchao, diffusers and transformers imported (tests/benchmarks/README.md)
_IMPORTS_BYTES = 480 * 10**6
# The same without the model libraries, where what a model is made of was remembered
_FEWER_IMPORTS_BYTES = 360 * 10**6
# Not measured, as nobody has run this on a GPU yet: a context on the GPU, and CUDA's libraries in host memory
_CONTEXT_BYTES = 500 * 10**6
_DRIVER_BYTES = 1000 * 10**6


def needs(
    plans: Sequence[ComponentPlan],
    unquantized: Sequence[UnquantizedPlan],
    copied: Sequence[CopyPlan],
    devices: Sequence[str],
) -> Needs:
    """Bytes on disk, and the peaks of host and device memory.

    Args:
        plans: the components.
        unquantized: parts of a pipeline whose weights pass through unchanged.
        copied: what is taken over.
        devices: the CPU, or the GPUs that share the work.
    """
    merged = sum(t.bytes_in for plan in plans if plan.copied is not None for t in plan.tensors if t.origin is None)
    streamed: list[StreamedPlan] = [*plans, *unquantized]
    disk = sum(file.size for plan in streamed for file in plan.files) + sum(item.size for item in copied) + merged
    built = any(plan.skeleton.model is not None for plan in plans)
    imports = _IMPORTS_BYTES if built else _FEWER_IMPORTS_BYTES
    if devices[0] == "cpu":
        host = imports + max((_tensors_peak(plan) for plan in streamed), default=0)
        return Needs(disk_bytes=disk, device_peak_bytes=0, host_peak_bytes=host)
    lanes = PER_DEVICE * len(devices)
    peaks = [*(_tensors_peak(plan, lanes) for plan in plans), *map(_tensors_peak, unquantized)]
    host = imports + _DRIVER_BYTES + max(peaks, default=0)
    on_device = _CONTEXT_BYTES + max((_on_device(plan) for plan in plans), default=0)
    return Needs(disk_bytes=disk, device_peak_bytes=on_device, host_peak_bytes=host)


def _pieces(tensor: TensorPlan) -> tuple[int, int]:
    """How many pieces a tensor comes in, and the source bytes of the largest."""
    ranges = slices(tensor)
    rows = ranges[-1][1]
    return len(ranges), -(-tensor.bytes_read * ranges[0][1] // rows) if rows else 0


def _tensors_peak(plan: StreamedPlan, lanes: int = 0) -> int:
    """Most bytes of tensors in memory: the buffers that are read into, and what is at work, waiting and written.

    With ``lanes`` of GPUs, buffers and the results of what is quantized are page-locked.
    """
    pooled, pieces, steps = 0, 0, []
    locked: Counter[int] = Counter()
    for tensor, count, largest in _order(plan):
        fits = largest <= SLICE_BYTES
        pooled = max(pooled, largest if fits else 0)
        pieces += count if fits else 0
        on_gpu = _on_gpu(tensor) and lanes > 0
        if is_streamed(tensor):
            held, many = -(-tensor.bytes_out // count), count
            result = 2 * held
        else:
            held, many = tensor.bytes_out, 1
            result = 0 if count == 1 and _is_copied(tensor) else held  # it is written from where it was read
        if on_gpu:  # it is written from where it came back to
            locked[_page_locked(held)] += many
            result = 0
        slow = tensor.scheme is not None and not tensor.scheme.rows.complete
        own = (0 if fits else largest) + tensor.working_bytes
        steps.append((own, 0 if on_gpu else _temporaries(tensor), result, slow))
    most = 0
    for at, (own, arithmetic, result, slow) in enumerate(steps):
        ahead = steps[at + 1][0] if at + 1 < len(steps) else 0
        # what takes longer to make than to write has nothing of its kind before it in the queue
        waiting = 0 if slow else _count_waiting([step[2] for step in steps[max(0, at - 8) : at]])
        most = max(most, own + ahead + arithmetic + result + waiting)
    if not lanes:
        return BUFFERS * pooled + most
    buffers = min(pieces, BUFFERS + lanes) * _page_locked(SLICE_BYTES)
    return buffers + most + sum(size * min(count, _at_once_locked(size, lanes)) for size, count in locked.items())


def _is_copied(tensor: TensorPlan) -> bool:
    return tensor.bytes_read == tensor.bytes_out and tensor.dtype == tensor.source_dtype


def _on_gpu(tensor: TensorPlan) -> bool:
    return tensor.scheme is not None and not tensor.scheme.cpu_only


def _page_locked(nbytes: int) -> int:
    """What torch takes for page-locked memory: a power of two. It keeps it for the next that is as large."""
    return 1 << max(0, nbytes - 1).bit_length()


def _at_once_locked(nbytes: int, lanes: int) -> int:
    """Results of a size in memory: one waits and one is written, beside those under way; giants do not pile up."""
    return 2 + (lanes if nbytes <= SLICE_BYTES else 1)


def _temporaries(tensor: TensorPlan) -> int:
    """What torchao takes for its arithmetic on a weight or on its largest block of rows."""
    scheme = tensor.scheme
    if scheme is None or not tensor.numel:
        return 0
    if scheme.rows.tile is None:
        return tensor.numel * scheme.entry.hqq_bytes
    columns = tensor.shape[-1]
    values = scheme.block(CPU_BLOCK // columns) * columns * at_once(scheme, columns)
    return min(tensor.numel, values) * BYTES_PER_VALUE


def _count_waiting(results: Sequence[int]) -> int:
    """Results that are not written yet: one in the writer's hands, and behind it what the channel takes."""
    if not results:
        return 0
    written, *queued = reversed(results)
    total = 0
    for result in queued:
        if total and total + result > READ_AHEAD_BYTES:
            break
        total += result
    return written + total


def _order(plan: StreamedPlan) -> Iterator[tuple[TensorPlan, int, int]]:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for name in plan.order:
        yield tensors[name], *_pieces(tensors[name])


def _on_device(plan: ComponentPlan) -> int:
    """Bytes of tensors on each GPU: a block of rows of the largest weight in each of its lanes."""
    return PER_DEVICE * max((_block_bytes(tensor) for tensor in plan.tensors if _on_gpu(tensor)), default=0)


def _block_bytes(tensor: TensorPlan) -> int:
    scheme = tensor.scheme
    assert scheme is not None
    columns = tensor.shape[-1]
    values = tensor.numel if scheme.rows.tile is None else scheme.block(DEVICE_BLOCK // columns) * columns
    return min(tensor.numel, values) * scheme.entry.device_block_bytes
