"""Two models of one class, tensor by tensor, under the library's own names; one of them is quantized.

Values are read some rows at a time, so that mapped weights stay where they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

_TOLERANCE_DB = 0.05
_ELEMENTS = 1 << 20  # that are looked at together
_SLICED = 1 << 23  # quantized tensors above this many elements are dequantized in slices


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and every buffer, also one that shares its memory with another, and one that no file holds."""
    both = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() if not is_quantized(tensor) else tensor for name, tensor in both}


def is_quantized(tensor: Any) -> bool:
    """A tensor of a class of its own, with other tensors in it."""
    return hasattr(tensor, "__tensor_flatten__")


def ties(model: Any) -> set[frozenset[str]]:
    """Names that are one tensor in memory."""
    places: defaultdict[tuple[int, ...], set[str]] = defaultdict(set)
    for name, tensor in tensors_of(model).items():
        if (place := _place(tensor)) is not None:
            places[place].add(name)
    return {frozenset(names) for names in places.values() if len(names) > 1}


def with_ties(model: Any, entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the manifest says of quantized tensors, also under the other names that they have in the model."""
    more = {name: entries[first] for group in ties(model) for first in group & entries.keys() for name in group}
    return {**more, **entries}


def _place(tensor: Any) -> tuple[int, ...] | None:
    if is_quantized(tensor):
        return _place(getattr(tensor, tensor.__tensor_flatten__()[0][0]))
    if tensor.is_meta or not tensor.numel():
        return None
    return (tensor.data_ptr(), tensor.numel())


def compare_ties(source: Any, result: Any, *, untied: bool) -> Iterator[str]:
    """Which tensors are one in only one of the two models; ``untied``: taken apart on purpose."""
    names = tensors_of(source).keys() & tensors_of(result).keys()
    here = {frozenset(group & names) for group in ties(source)}
    there = {frozenset(group & names) for group in ties(result)}
    for group in sorted(map(sorted, here - there)):
        apart = untied and not any(set(other) & set(group) for other in there)
        if len(group) > 1 and not apart:
            yield f"{' and '.join(group)} are one tensor in the source, but not in the result"
    for group in sorted(map(sorted, there - here)):
        if len(group) > 1 and not any(set(group) < set(other) for other in here):
            yield f"{' and '.join(group)} are one tensor in the result, but not in the source"


def compare_dtype(name: str, expected: torch.Tensor, found: torch.Tensor) -> str | None:
    """The dtype that the library gives a tensor of the source against the one that it gives the result's."""
    if expected.dtype == found.dtype:
        return None
    return f"{name} is {_short(found.dtype)}, but the library loads it as {_short(expected.dtype)}"


def compare_values(name: str, original: torch.Tensor, found: torch.Tensor) -> str | None:
    """The same bits, once the source's are cast to the result's dtype."""
    if original.shape != found.shape:
        return f"{name} has the shape {list(found.shape)}, {list(original.shape)} in the source"
    if original.is_meta != found.is_meta:  # diffusers leaves what no file holds without values
        return (
            f"{name} has values only in the {'result' if original.is_meta else 'source'}: no file of the other model "
            f"holds it"
        )
    pairs = zip(_pieces(original), _pieces(found), strict=True)
    if original.is_meta:
        return None
    return None if all(_same_bits(a.to(b.dtype), b) for a, b in pairs) else f"{name} has other values than the source"


def compare_buffers(name: str, expected: torch.Tensor, found: torch.Tensor) -> str | None:
    """Buffers that no file holds: the same values in the coarser of the two dtypes.

    diffusers casts them in a plain model and leaves them as they are in a quantized one.
    """
    if expected.shape != found.shape:
        return f"{name} has the shape {list(found.shape)}, {list(expected.shape)} in the source"
    dtype = min((expected.dtype, found.dtype), key=lambda dtype: dtype.itemsize)
    same = _same_bits(expected.contiguous().to(dtype), found.contiguous().to(dtype))
    return None if same else f"{name}, which no file holds, has other values than in the source"


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements in order, some at a time."""
    if not tensor.dim():
        yield tensor.reshape(1)
        return
    step = max(1, _ELEMENTS // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), step):
        yield tensor[start : start + step].contiguous()


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if not first.numel():
        return True
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def compare_quantized(
    name: str, original: torch.Tensor, found: Any, entry: dict[str, Any]
) -> tuple[float | None, str | None]:
    """The SQNR of a quantized tensor in dB, and what is wrong with it.

    Raises:
        NotImplementedError: neither torchao nor its kernels give back the values of this class here.
    """
    kind = f"{type(found).__module__}.{type(found).__qualname__}"
    if kind != entry["class_name"]:
        return None, f"{name} is a {kind}, but the manifest says {entry['class_name']}"
    if original.shape != found.shape:
        return None, f"{name} has the shape {list(found.shape)}, {list(original.shape)} in the source"
    stated = math.inf if entry["sqnr_db"] is None else float(entry["sqnr_db"])
    sqnr = _sqnr(original, found, sliced=original.numel() > _SLICED)
    if not _close(sqnr, stated) and original.numel() > _SLICED:
        sqnr = _sqnr(original, found, sliced=False)
    if _close(sqnr, stated):
        return sqnr, None
    return sqnr, f"{name} has an SQNR of {sqnr:.2f} dB to the source, but the manifest says {stated:.2f}"


def _close(sqnr: float, stated: float) -> bool:
    return sqnr == stated or abs(sqnr - stated) <= _TOLERANCE_DB


def _sqnr(original: torch.Tensor, found: Any, *, sliced: bool) -> float:
    """20·log10(‖w‖/‖w − dequantized‖), in dB; infinite where either is zero."""
    signal = noise = 0.0
    for weight, values in _both(original, found, sliced=sliced):
        signal += _square(weight)
        noise += _square(weight - values)
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _square(values: torch.Tensor) -> float:
    wide = values.reshape(-1).to(torch.float64)
    return float(torch.dot(wide, wide))


def _both(original: torch.Tensor, found: Any, *, sliced: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of the source's weight and of what stands for them, in float32."""
    step = max(1, _ELEMENTS // max(1, original[:1].numel()))
    whole = None if sliced else _values(found)
    for start in range(0, len(original), step):
        rows = slice(start, start + step)
        try:
            values = _values(found[rows]) if whole is None else whole[rows]
        except (NotImplementedError, RuntimeError, AssertionError, TypeError, AttributeError):
            whole = _values(found)  # a class that cannot be sliced
            values = whole[rows]
        yield original[rows].to(torch.float32), values.to(torch.float32)


def _values(tensor: Any) -> torch.Tensor:
    """What a quantized tensor stands for: torchao's ``dequantize``, or what its kernel makes of the unit matrix."""
    try:
        values: torch.Tensor = tensor.dequantize()
    except (AttributeError, NotImplementedError, RuntimeError, AssertionError):
        values = _by_kernel(tensor)
    return values


def _by_kernel(tensor: Any) -> torch.Tensor:
    """Each column of the unit matrix is a column of the weight; the kernel rounds nothing that it does not store."""
    if tensor.dim() != 2:
        raise NotImplementedError(type(tensor).__name__)
    columns = []
    unit = torch.eye(tensor.shape[1], dtype=torch.bfloat16)
    try:
        for start in range(0, len(unit), 1024):
            columns.append(functional.linear(unit[start : start + 1024], tensor))
    except Exception as error:
        raise NotImplementedError(f"{type(tensor).__name__}: {error}") from error
    return torch.cat(columns).t()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
