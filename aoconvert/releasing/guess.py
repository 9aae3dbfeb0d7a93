"""How long it may take to quantize a variant: a guess, for whoever decides whether to start a release now."""

from __future__ import annotations

from aoconvert.planning import Plan

_START = 3.3  # seconds: imports and the plan
_READ = 2.6  # seconds for each GB of the source that is read, hashed, written and hashed again
# The same where it is quantized, by how the scheme's name begins; the longest that fits counts
_QUANTIZED = {
    "int8": 2.6,
    "float8": 2.6,
    "float8dq": 3.1,
    "float8dq_block": 3.6,
    "int4": 3.2,
    "int8dq_int": 3.2,
    "intx": 3.2,
    "uint": 3.2,
    "mx": 3.6,
    "nvfp4": 11.0,
}
_SLOWEST = max(_QUANTIZED.values())


def guess_seconds(plan: Plan) -> float | None:
    """Guess how long quantizing takes, from its bytes and schemes; downloads, verify and eval come on top of it.

    The rates were measured on two CPU cores with warm caches (``tests/benchmarks/README.md``: "Size", "int8wo",
    "float8wo", "int4dq", "nvfp4wo", "Blocks of rows"); a scheme that was not measured is taken for one of its kind. So
    another machine takes a fraction or a multiple of it.

    Args:
        plan: the plan.

    Returns:
        Seconds; ``None`` for GPUs, which nobody has measured yet.
    """
    if any(device != "cpu" for device in plan.devices):
        return None
    seconds = _START
    for part in plan.streamed:
        for tensor in part.tensors:
            rate = _READ if tensor.scheme is None else _rate(tensor.scheme.name)
            seconds += tensor.bytes_in / 1e9 * rate
    return round(seconds, 1)


def _rate(scheme: str) -> float:
    fits = [start for start in _QUANTIZED if scheme.startswith(start)]
    return _QUANTIZED[max(fits, key=len)] if fits else _SLOWEST
