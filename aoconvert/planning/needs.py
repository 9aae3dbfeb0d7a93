"""What a run will take: bytes on disk, and the peaks of host and device memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aoconvert.planning.slices import BLOCK_BYTES, BUFFERS, CPU_BLOCK, SLICE_BYTES, at_once, is_streamed, slices
from aoconvert.planning.types import ComponentPlan, CopyPlan, Needs, StreamedPlan, TensorPlan, UnquantizedPlan

READ_AHEAD_BYTES = SLICE_BYTES
"""Most bytes that wait between two stages; a single larger tensor may."""

# Measured: the process with torch, torchao, diffusers and transformers imported (tests/benchmarks/README.md)
_IMPORTS_BYTES = 480 * 10**6
# The same without the model libraries, where what a model is made of was remembered
_FEWER_IMPORTS_BYTES = 360 * 10**6
# Measured: temporaries a weight's element, where HQQ takes a whole weight at once; for int4 in more steps
_HQQ_BYTES, _HQQ_INT4_BYTES = 16, 38


def needs(
    plans: Sequence[ComponentPlan], unquantized: Sequence[UnquantizedPlan], copied: Sequence[CopyPlan], device: str
) -> Needs:
    """Bytes on disk, and the peaks of host and device memory."""
    merged = sum(t.bytes_in for plan in plans if plan.copied is not None for t in plan.tensors if t.origin is None)
    streamed: list[StreamedPlan] = [*plans, *unquantized]
    disk = sum(file.size for plan in streamed for file in plan.files) + sum(item.size for item in copied) + merged
    built = any(plan.skeleton.model is not None for plan in plans)
    imports = _IMPORTS_BYTES if built else _FEWER_IMPORTS_BYTES
    host = imports + max((_tensors_peak(plan, device) for plan in streamed), default=0)
    on_device = 0 if device == "cpu" else max((_on_device(plan) for plan in plans), default=0)
    return Needs(disk_bytes=disk, device_peak_bytes=on_device, host_peak_bytes=host)


def _pieces(tensor: TensorPlan) -> tuple[int, int]:
    """How many pieces a tensor comes in, and the source bytes of the largest."""
    ranges = slices(tensor)
    rows = ranges[-1][1]
    return len(ranges), -(-tensor.bytes_in * ranges[0][1] // rows) if rows else 0


def _tensors_peak(plan: StreamedPlan, device: str) -> int:
    """Most bytes of tensors in memory: the buffers that are read into, and what is at work, waiting and written."""
    pooled, steps = 0, []
    for tensor, count, largest in _ordered(plan):
        fits = largest <= SLICE_BYTES
        pooled = max(pooled, largest if fits else 0)
        arithmetic = _temporaries(tensor) if device == "cpu" else 0
        if is_streamed(tensor):
            result = 2 * -(-tensor.bytes_out // count)
        elif tensor.bytes_in == tensor.bytes_out and tensor.dtype == tensor.source_dtype and count == 1:
            result = 0  # it is written from where it was read
        else:
            result = tensor.bytes_out
        slow = tensor.scheme is not None and not tensor.scheme.single_rows
        steps.append(((0 if fits else largest) + tensor.working_bytes, arithmetic, result, slow))
    most = 0
    for at, (own, arithmetic, result, slow) in enumerate(steps):
        ahead = steps[at + 1][0] if at + 1 < len(steps) else 0
        # what takes longer to make than to write has nothing of its kind before it in the queue
        waiting = 0 if slow else _waiting([step[2] for step in steps[max(0, at - 8) : at]])
        most = max(most, own + ahead + arithmetic + result + waiting)
    return BUFFERS * pooled + most


def _temporaries(tensor: TensorPlan) -> int:
    """What torchao takes for its arithmetic on a weight or on its largest block of rows."""
    scheme = tensor.scheme
    if scheme is None or not tensor.numel:
        return 0
    if scheme.unit is None:
        return tensor.numel * (_HQQ_BYTES if scheme.int4 is None else _HQQ_INT4_BYTES)
    columns = tensor.shape[-1]
    values = scheme.block(CPU_BLOCK // columns) * columns * at_once(scheme, columns)
    return min(tensor.numel, values) * BLOCK_BYTES


def _waiting(results: Sequence[int]) -> int:
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


def _ordered(plan: StreamedPlan) -> Iterator[tuple[TensorPlan, int, int]]:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for name in plan.order:
        yield tensors[name], *_pieces(tensors[name])


def _on_device(plan: ComponentPlan) -> int:
    """The largest piece three times (as read, cast, and torchao's temporaries) and its result, twice: two in flight."""
    most = 0
    for tensor, count, largest in _ordered(plan):
        if tensor.action == "quantize":
            most = max(most, 2 * (3 * largest + -(-tensor.bytes_out // count)))
    return most
