"""What a method of quantization has to say of a checkpoint: its tensors as if they were not quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.models.base import Codes, ModelPart, SourceTensor

if TYPE_CHECKING:
    import torch

Peek = Callable[[SourceTensor], "torch.Tensor"]
"""Reads a small stored tensor."""

NOT_USED = "belongs to the quantization of the original, and has no use without it"
ACTIVATIONS = "scales activations that the original quantizes; torchao computes such scales from each input"
CACHE = "scales a quantized key-value cache, which no weight depends on"
_AGAIN = "download the whole checkpoint again, or start from the original that is not quantized"


@dataclass(frozen=True)
class Original:
    """How the source was quantized.

    Attributes:
        method: ``quant_method`` of its config.
        how: what is stored, in words.
        dequantized_by: whose code makes the values: a package and its version.
        dtype: what the model's config says that it runs in.
        tensors: how many tensors are made of quantized ones.
        carried: how many of these keep their codes.
    """

    method: str
    how: str
    dequantized_by: str
    dtype: str
    tensors: int
    carried: int = 0


@dataclass
class Sorted:
    """The stored tensors of a checkpoint, taken one after the other for what is made of them.

    Attributes:
        component: the model, without its quantization.
        config: ``quantization_config``.
        left: those that nothing was made of yet.
        made: those that a formula makes.
        dropped: what is left out, and why.
        peek: reads a small one.
    """

    component: ModelPart
    config: Mapping[str, Any]
    left: dict[str, SourceTensor]
    peek: Peek
    made: dict[str, SourceTensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What messages call the model."""
        return self.component.title

    def add(self, tensor: SourceTensor) -> None:
        """Take a tensor that its formula makes, and with it the parts.

        Raises:
            SourceError: it is there as it is, too.
        """
        assert tensor.formula is not None
        for part in tensor.formula.parts:
            self.left.pop(part.name, None)
        if tensor.name in self.left or tensor.name in self.made:
            raise self.damaged(f"{tensor.name} is there twice, quantized and as it is")
        self.made[tensor.name] = tensor

    def drop(self, names: Callable[[str], bool], why: str = NOT_USED) -> None:
        """Leave out what is left of the quantization and of no use without it."""
        self.drop_as([name for name in self.left if names(name)], why)

    def drop_as(self, names: Iterable[str], reason: str) -> None:
        """Leave out what is left of these, for a reason."""
        for name in names:
            del self.left[name]
            self.dropped[name] = reason

    def damaged(self, problem: str) -> SourceError:
        """The error for what does not fit together; to be raised."""
        return SourceError(f"{self.title}: {problem}", hint=_AGAIN)

    def check_shape(self, part: SourceTensor, expected: tuple[int, ...], of: str) -> None:
        """Refuse a part that does not fit.

        Raises:
            SourceError: it has another shape than ``of`` calls for.
        """
        if part.shape != expected:
            raise self.damaged(f"{part.name} has the shape {list(part.shape)}, but {of} needs {list(expected)}")

    def refuse_narrow(self) -> None:
        """Refuse tensors of 8 bits and less of which nothing was made: their values mean nothing by themselves.

        Raises:
            SourceError: there is one.
        """
        narrow = [tensor for tensor in self.left.values() if tensor.dtype.itemsize == 1 and _is_number(tensor)]
        if narrow:
            more = f" (and {len(narrow) - 1} more likewise)" if len(narrow) > 1 else ""
            first = narrow[0]
            raise self.damaged(f"{first.name} is {dtype_name(first.dtype)}, and no scale belongs to it{more}")


def _is_number(tensor: SourceTensor) -> bool:
    import torch

    return tensor.dtype != torch.bool and len(tensor.shape) > 1


def made(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], formula: Any, codes: Codes | None = None
) -> SourceTensor:
    """A tensor of this name, dtype and shape, which the formula makes; ``codes`` as of :class:`SourceTensor`."""
    parts: tuple[SourceTensor, ...] = formula.parts
    nbytes = sum(part.nbytes for part in parts)
    return SourceTensor(parts[0].file, name, dtype, shape, nbytes, formula=formula, codes=codes)
