"""What becomes of a tensor, by its class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from aoconvert.environment import import_torchao
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.humanize import with_article
from aoconvert.rewriting.migrate_types import CannotMigrate, Outcome, Read, dtype_of, read_meta
from aoconvert.rewriting.old_torchao.activations import NO_ACTIVATIONS, Activations, last_name, unwrap
from aoconvert.rewriting.old_torchao.floats import float8
from aoconvert.rewriting.old_torchao.integers import int4_packed, plain, uintx
from aoconvert.rewriting.old_torchao.packed import floatx, int4_cpu, int4_opaque, nf4, tiled
from aoconvert.rewriting.old_torchao.todays import todays
from aoconvert.rewriting.old_torchao.weight import AGAIN, Weight

_DTYPES = ("bfloat16", "float16", "float32")
_AFFINE: Mapping[str, Callable[[Weight, Activations], Outcome]] = {
    "PlainAQT": plain,
    "QDQ": plain,
    "UintxAQT": uintx,
    "Int4Packed": int4_packed,
    "Float8AQT": float8,
    "TensorCoreTiledAQT": tiled,
    "Int4CPUAQT": int4_cpu,
    "FpxTensorCoreAQT": floatx,
    "FloatxTensorCoreAQT": floatx,
}
"""By the implementation's name, without ``Layout`` (up to torchao 0.6.1) or ``TensorImpl``."""


def decide(tensor: BinTensor, read: Read, packed_on: str | None = None) -> Outcome:
    """What becomes of a quantized tensor.

    Args:
        tensor: of a torchao class, today's or gone.
        read: gives the elements of the small tensors (zero points) that decide.
        packed_on: the CPU that packed int4 weights for the CPU: ``avx512``, ``avx2``, ``generic``.

    Raises:
        CannotMigrate: there is no counterpart that is known to be right.
    """
    import_torchao()
    if tensor.dtype not in _DTYPES or len(tensor.shape) != 2:
        raise CannotMigrate(f"it is {tensor.dtype} of shape {tensor.shape}, not a matrix of floats")
    outcome = _decide(tensor, read, packed_on)
    _try(outcome, tensor)
    return outcome


def _try(outcome: Outcome, tensor: BinTensor) -> None:
    """Make it of empty parts: what a file says of itself may contradict itself, which torch then refuses.

    Raises:
        CannotMigrate: it does.
    """
    try:
        made = outcome.make(read_meta)
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CannotMigrate(f"its parts do not fit each other: {said}") from error
    if made.shape != tensor.shape or made.dtype != dtype_of(tensor):
        raise CannotMigrate(f"its parts make a tensor of shape {tuple(made.shape)}, but it says {tensor.shape}")


def _decide(tensor: BinTensor, read: Read, packed_on: str | None) -> Outcome:
    weight, activations = unwrap(tensor)
    name = last_name(weight.class_name)
    if name == "AffineQuantizedTensor":
        found = Weight(weight, read, packed_on)
        build = _AFFINE.get(re.sub("(Layout|TensorImpl)$", "", last_name(found.impl.class_name)))
        if build is None:
            raise _unknown(last_name(found.impl.class_name))
        return build(found, activations)
    if activations is not NO_ACTIVATIONS:
        raise CannotMigrate(f"{with_article(name)} within {with_article(last_name(tensor.class_name))} is not known")
    if (outcome := todays(weight, read)) is not None:
        return outcome
    if name == "Int4OpaqueTensor":
        return int4_opaque(weight, packed_on)
    if name == "NF4Tensor":
        return nf4(weight)
    raise _unknown(name)


def _unknown(name: str) -> CannotMigrate:
    return CannotMigrate(f"no class of today is known to hold the values of {with_article(name)}", AGAIN)
