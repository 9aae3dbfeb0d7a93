"""The one comparison of tensors in the tests: class, layout, attributes and every bit, down to the inner tensors."""

from __future__ import annotations

from typing import Any

import torch


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor's bytes: uint8, one dimension. NaN equals NaN there, and -0 does not equal 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def difference(made: Any, reference: Any, name: str = "") -> str | None:
    """What differs first, and in which inner tensor; None where the two are the same."""
    if type(made) is not type(reference):
        return f"{name}: {type(made).__name__}, not {type(reference).__name__}"
    for fact in ("dtype", "shape", "device"):
        if getattr(made, fact) != getattr(reference, fact):
            return f"{name}: {fact} {getattr(made, fact)}, not {getattr(reference, fact)}"
    if made.stride() != reference.stride():
        return f"{name}: strides {made.stride()}, not {reference.stride()}"
    if not hasattr(made, "__tensor_flatten__"):
        return None if torch.equal(bits(made), bits(reference)) else f"{name}: other bits"
    (names, context), (others, wanted) = made.__tensor_flatten__(), reference.__tensor_flatten__()
    if list(names) != list(others):
        return f"{name}: inner tensors {names}, not {others}"
    if context != wanted or str(context) != str(wanted):  # 1 and True are equal, and differ
        return f"{name}: attributes {context}, not {wanted}"
    inner = (difference(getattr(made, each), getattr(reference, each), f"{name}.{each}") for each in names)
    return next((found for found in inner if found is not None), None)


def same(made: Any, reference: Any) -> bool:
    """Whether nothing differs."""
    return difference(made, reference) is None


def assert_same(made: Any, reference: Any, name: str = "") -> None:
    """Nothing differs; else the message says what does, of the tensor called ``name``."""
    found = difference(made, reference, name)
    assert found is None, found
