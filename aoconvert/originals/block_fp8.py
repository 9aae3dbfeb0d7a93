"""8-bit floating point with a scale for each block: DeepSeek-V3, Qwen-FP8 and their like, ``quant_method`` ``fp8``.

A weight ``W`` is ``float8_e4m3fn``, with ``W_scale_inv`` beside it: one value for each block of ``weight_block_size``,
or one for the whole matrix where that is null. Experts may hold two 4-bit values (e2m1) in a byte instead.
Source of names and formula: ``transformers.integrations.finegrained_fp8`` and its quantizer, whose own code makes the
values here. It takes blocks of equal size only; where the last ones are cut off (576 rows in blocks of 128), it gets
these by themselves, as the format has it: https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aoconvert.models.base import Codes, Load, Rows, SourceTensor
from aoconvert.originals.base import ACTIVATIONS, Sorted, made

if TYPE_CHECKING:
    import torch

_SCALE = "_scale_inv"
# other names for ``X.weight_scale_inv``: update_weight_conversions of the library's quantizer
_OTHER_SCALES = (".scale", ".qscale_weight")
_ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act")


@dataclass(frozen=True)
class BlockScaled:
    """A matrix, or a stack of matrices, and the scales of its blocks.

    Attributes:
        block: rows and columns of a block.
        packed: values of a byte.
    """

    weight: SourceTensor
    scale: SourceTensor
    block: tuple[int, int]
    packed: int = 1

    @property
    def parts(self) -> tuple[SourceTensor, ...]:
        """Weight and scales."""
        return self.weight, self.scale

    @property
    def unit(self) -> int:
        """Rows of a block; of a stack its matrices come one by one, and one scale for all asks for nothing."""
        return self.block[0] if len(self.scale.shape) == 2 else 1

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """In float32, the precision of the library's arithmetic; it casts last."""
        weight = load(self.weight, rows)
        if len(self.scale.shape) < 2:
            scale = load(self.scale, None)
        elif len(self.scale.shape) == 2:
            unit = self.block[0]
            scale = load(self.scale, (rows[0] // unit, -(-rows[1] // unit)))
        else:
            scale = load(self.scale, rows)
        return _dequantize(weight, scale, self.block, self.packed)


def _dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], packed: int) -> torch.Tensor:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    by = Fp8Dequantize(None)
    rows, columns = weight.shape[-2], weight.shape[-1] * packed
    if scale.dim() < 2 or (rows % block[0] == 0 and columns % block[1] == 0):
        found: torch.Tensor = by._dequantize_one(weight, scale, output_dtype=torch.float32)
        return found
    result = torch.empty((*weight.shape[:-1], columns), dtype=torch.float32)
    for top, bottom in _edges(rows, block[0]):
        for left, right in _edges(columns, block[1]):
            part = weight[..., top:bottom, left // packed : right // packed]
            of = scale[..., top // block[0] : -(-bottom // block[0]), left // block[1] : -(-right // block[1])]
            result[..., top:bottom, left:right] = by._dequantize_one(part, of, output_dtype=torch.float32)
    return result


def _edges(size: int, block: int) -> Iterator[Rows]:
    """Whole blocks together, then what is left."""
    whole = size // block * block
    if whole:
        yield 0, whole
    if whole < size:
        yield whole, size


def sort(found: Sorted) -> str:
    """Take the quantized weights; say how they are stored.

    Raises:
        SourceError: a weight without its scales, or with scales that do not fit.
    """
    blocks = set()
    for name, weight in list(found.left.items()):
        scale = _scale_of(found, weight)
        if scale is None:
            continue
        name = name.removesuffix(".qweight") + ".weight" if name.endswith(".qweight") else name
        formula = _formula(found, weight, scale)
        shape = (*weight.shape[:-1], weight.shape[-1] * formula.packed)
        import torch

        found.add(made(name, torch.float32, shape, formula, _codes(formula)))
        blocks.add((formula.packed, formula.block if len(scale.shape) > 1 else None))
    found.drop(lambda name: name.endswith(_ACTIVATIONS), ACTIVATIONS)
    found.refuse_narrow()
    return " and ".join(_describe(packed, block) for packed, block in sorted(blocks, key=str))


def _describe(packed: int, block: tuple[int, int] | None) -> str:
    kind = "float8" if packed == 1 else "float4"
    return f"{kind} with a scale for each " + ("tensor" if block is None else f"block of {block[0]}×{block[1]}")


def _scale_of(found: Sorted, weight: SourceTensor) -> SourceTensor | None:
    """The scales that belong to a weight in 8 bits."""
    if weight.dtype.itemsize != 1 or not weight.shape:
        return None
    module = weight.name.rpartition(".")[0]
    names = [f"{weight.name}{_SCALE}", *(f"{module}{suffix}" for suffix in _OTHER_SCALES)]
    names = names if weight.name.endswith(".weight") else names[:1]
    return next((found.left[name] for name in names if name in found.left and name != weight.name), None)


def _formula(found: Sorted, weight: SourceTensor, scale: SourceTensor) -> BlockScaled:
    import torch

    packed = 2 if weight.dtype in (torch.int8, getattr(torch, "float4_e2m1fn_x2", None)) else 1
    rows, columns = weight.shape[-2:] if len(weight.shape) > 1 else (1, 0)
    columns *= packed
    if len(weight.shape) < 2:
        raise found.damaged(f"{weight.name} has the shape {list(weight.shape)}, which no matrix has")
    if len(scale.shape) < 2:
        if scale.nbytes != scale.dtype.itemsize:
            found.check_shape(scale, (), weight.name)
        return BlockScaled(weight, scale, (1, 1), packed)
    grid = scale.shape[-2:]
    block = _block_of(found.config.get("weight_block_size"))
    if block is None or (-(-rows // block[0]), -(-columns // block[1])) != grid or packed > 1:
        # as the library has it, where blocks of different kinds are in one checkpoint
        if 0 in grid or rows % grid[0] or columns % grid[1]:
            expected = [-(-rows // block[0]), -(-columns // block[1])] if block else "another one"
            raise found.damaged(f"{scale.name} has the shape {list(scale.shape)}, but {weight.name} needs {expected}")
        block = (rows // grid[0], columns // grid[1])
    found.check_shape(scale, (*weight.shape[:-2], *grid), weight.name)
    return BlockScaled(weight, scale, block, packed)


def _codes(formula: BlockScaled) -> Codes | None:
    """What torchao's class for float8 can hold: a matrix whose values are not packed."""
    weight, scale = formula.weight, formula.scale
    if len(weight.shape) != 2 or formula.packed > 1:
        return None
    rows, columns = weight.shape
    return Codes(weight, scale, (rows, columns) if len(scale.shape) < 2 else formula.block)


def _block_of(size: object) -> tuple[int, int] | None:
    if isinstance(size, list) and len(size) == 2 and all(type(value) is int and value > 0 for value in size):
        return size[0], size[1]
    return None
