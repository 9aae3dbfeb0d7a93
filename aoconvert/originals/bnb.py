"""bitsandbytes: ``nf4`` and ``fp4`` in blocks, and ``int8`` in rows, as transformers and diffusers save them.

4 bits: ``M.weight`` holds two values in a byte, flat; beside it ``M.weight.absmax`` (a scale for each block, itself in
8 bits where it is ``nested``), ``M.weight.quant_map`` and, as JSON in bytes,
``M.weight.quant_state.bitsandbytes__nf4``. 8 bits: ``M.weight`` is int8, ``M.SCB`` the largest absolute value of a row.
Source of names and states: ``bitsandbytes.functional.QuantState`` and ``bitsandbytes.nn.modules`` (0.50), whose own
code makes the values here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from aoconvert.models.base import Load, Rows, SourceTensor
from aoconvert.originals.base import Sorted, made

if TYPE_CHECKING:
    import torch

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
_STATE_BYTES = 1 << 12
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class FourBits:
    """A matrix in blocks of 4-bit values, which run on over the ends of rows.

    Attributes:
        stored: its tensors, by the names that a ``QuantState`` has for them.
        state: what its JSON says.
    """

    weight: SourceTensor
    stored: dict[str, SourceTensor]
    state: dict[str, Any]

    @property
    def parts(self) -> tuple[SourceTensor, ...]:
        """The values first."""
        return self.weight, *self.stored.values()

    @cached_property
    def unit(self) -> int:
        """Rows that whole blocks fill."""
        blocksize = int(self.state["blocksize"])
        return blocksize // gcd(blocksize, prod(self.state["shape"][1:]))

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """In the dtype that the state names."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        tensors = {name: load(part, None) for name, part in self.stored.items()}
        state = QuantState.from_dict({**tensors, **self.state}, torch.device("cpu"))
        if state.nested:  # these blocks are others, and there are few of them
            state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
            state.nested = False
        row, blocksize = prod(state.shape[1:]), state.blocksize
        first, last = rows[0] * row, rows[1] * row
        state.absmax = state.absmax[first // blocksize : -(-last // blocksize)].contiguous()
        state.shape = torch.Size((rows[1] - rows[0], *state.shape[1:]))
        values = 2 * self.weight.dtype.itemsize
        packed = load(self.weight, (first // values, -(-last // values))).view(torch.uint8).reshape(-1, 1)
        found: torch.Tensor = dequantize_4bit(packed, state)
        return found


@dataclass(frozen=True)
class EightBits:
    """A matrix of int8, and the largest value of each row."""

    weight: SourceTensor
    largest: SourceTensor
    format: SourceTensor | None
    unit: int = 1

    @property
    def parts(self) -> tuple[SourceTensor, ...]:
        """The values first."""
        return (self.weight, self.largest, *([self.format] if self.format is not None else []))

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """In float32."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        found: torch.Tensor = int8_vectorwise_dequant(load(self.weight, rows), load(self.largest, rows))
        return found


def sort(found: Sorted) -> str:
    """Take the quantized weights; say how they are stored.

    Raises:
        SourceError: parts are missing, or do not fit.
    """
    kinds: dict[str, None] = {}
    for name in list(found.left):
        if match := _STATE.fullmatch(name):
            kinds[_add_four_bits(found, match[1], found.left[name])] = None
        elif name.endswith(".SCB"):
            _add_eight_bits(found, name.removesuffix(".SCB"), found.left[name])
            kinds["int8 with a scale for each row"] = None
    found.refuse_narrow()
    return " and ".join(kinds)


def _add_four_bits(found: Sorted, name: str, place: SourceTensor) -> str:
    import torch

    if name not in found.left:
        raise found.damaged(f"{place.name} is there, and {name} is not")
    prefix = f"{name}."
    stored = {key.removeprefix(prefix): part for key, part in found.left.items() if key.startswith(prefix)}
    del stored[place.name.removeprefix(prefix)]
    state = _read_state(found, place)
    nested = ("nested_absmax", "nested_quant_map") if "nested_blocksize" in state else ()
    expected = {"absmax", "quant_map", *nested}
    if missing := sorted(expected - stored.keys()):
        raise found.damaged(f"{name} has no {prefix}{missing[0]} beside it")
    weight, numel = found.left[name], prod(state["shape"])
    bytes_ = -(-numel // 2)
    if weight.shape[:1] != (weight.nbytes // weight.dtype.itemsize,) or weight.nbytes != bytes_:
        raise found.damaged(f"{name} has {weight.nbytes} bytes, but {list(state['shape'])} takes {bytes_}")
    found.check_shape(stored["absmax"], (-(-numel // state["blocksize"]),), name)
    parts = {key: stored[key] for key in sorted(expected)}
    formula = FourBits(weight, {**parts}, state)
    del found.left[place.name]
    dtype: torch.dtype = getattr(torch, state["dtype"])
    found.add(made(name, dtype, tuple(state["shape"]), formula))
    how = ", these in 8 bits" if nested else ""
    return f"{state['quant_type']} with a scale for each block of {state['blocksize']}{how}"


def _read_state(found: Sorted, place: SourceTensor) -> dict[str, Any]:
    """The values of a state, which may hold anything."""
    try:
        if place.nbytes > _STATE_BYTES:
            raise ValueError
        values = json.loads(bytes(found.peek(place).flatten().tolist()))
        sizes = [*values["shape"], values["blocksize"]]
        if not all(type(size) is int and size > 0 for size in sizes) or values["dtype"] not in _DTYPES:
            raise ValueError
        if values["quant_type"] not in ("nf4", "fp4") or len(values["shape"]) < 2:
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise found.damaged(f"{place.name} does not describe a matrix in 4 bits") from error
    return dict(values)


def _add_eight_bits(found: Sorted, module: str, largest: SourceTensor) -> None:
    import torch

    weight = found.left.get(f"{module}.weight")
    if weight is None or weight.dtype != torch.int8 or len(weight.shape) != 2:
        raise found.damaged(f"{largest.name} is there, and no {module}.weight of int8")
    found.check_shape(largest, weight.shape[:1], weight.name)
    order = found.left.get(f"{module}.weight_format")
    if order is not None and (order.shape not in ((), (1,)) or int(found.peek(order).flatten()[0]) != 0):
        raise found.damaged(f"{order.name} says that {weight.name} is laid out for a GPU, and not in rows")
    found.add(made(weight.name, torch.float32, weight.shape, EightBits(weight, largest, order)))
