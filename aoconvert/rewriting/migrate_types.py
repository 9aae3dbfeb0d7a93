"""What a migration makes of one tensor, whoever wrote it; a kind of input gives one :class:`Outcome` per tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch

from aoconvert.formats.digest import FileDigest, Mark
from aoconvert.formats.torch_bin.contents import BinTensor

Read = Callable[[BinTensor], torch.Tensor]
"""Gives the elements of a plain tensor: from the file, or on ``meta``, where only shapes and dtypes count."""

Kind = Literal["torchao", "quanto"]


class CannotMigrate(Exception):
    """Why a tensor has no counterpart of today that is known to be right; ``hint`` says what to do."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class SchemeName:
    """A scheme of the catalogue, which makes such tensors today; arguments as of ``schemes.get``."""

    name: str
    group_size: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    layout_device: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for equal ones."""
        return (self.name, self.group_size, tuple(sorted(self.settings.items())), self.layout_device)


@dataclass(frozen=True)
class Outcome:
    """What becomes of a quantized tensor.

    Attributes:
        make: makes the tensor of today, or the values in the old one's dtype where it is not carried.
        scheme: what makes such tensors today; ``None``: it is dequantized.
        reason: why it is dequantized, or what its owner should know of a tensor that is carried: its codes and scales
            are the same, but what is computed with them is not.
        packing: how the bytes are packed, where the scheme's layout does not say it.
        unconfirmed: why nobody can be sure of the packed bytes yet.
    """

    make: Callable[[Read], torch.Tensor]
    scheme: SchemeName | None
    reason: str | None = None
    packing: str | None = None
    unconfirmed: str | None = None

    @property
    def is_carried(self) -> bool:
        """Whether codes and scales stay as they are."""
        return self.scheme is not None


def read_meta(tensor: BinTensor) -> torch.Tensor:
    """An empty tensor on ``meta`` like a plain one."""
    return torch.empty(tensor.shape, dtype=dtype_of(tensor), device="meta")


def dtype_of(tensor: BinTensor) -> torch.dtype:
    """What the tensor appears as."""
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    return dtype


def stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor's data, of all inner tensors together; also on ``meta``."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return int(tensor.nbytes)
    return sum(stored_bytes(getattr(tensor, name)) for name in flatten()[0])


@dataclass(frozen=True)
class OldTensor:
    """A tensor of an old checkpoint, and what can be made of it.

    Attributes:
        name: its key in the state dict.
        shape, dtype: what it appears as; the dtype is without ``torch.``.
        stored_dtype: of most of its bytes.
        bytes_in: all that is stored for it.
        file: the source's file that holds it.
        make: makes it: the tensor of today, the values where it is not carried, or the plain tensor. On ``meta`` where
            the argument says so, which takes no data.
        was_quantized: it was of a quantized class.
        scheme, reason, packing, unconfirmed: as of :class:`Outcome`.
        exact: gives the values that the old tensor stands for, where those of what is made may differ.
        place: the same for tensors that share all their data; ``None`` where none can.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored_dtype: str
    bytes_in: int
    file: str
    make: Callable[[bool], torch.Tensor]
    was_quantized: bool = False
    scheme: SchemeName | None = None
    reason: str | None = None
    packing: str | None = None
    unconfirmed: str | None = None
    exact: Callable[[], torch.Tensor] | None = None
    place: tuple[object, ...] | None = None


class OldWeights(Protocol):
    """The weights of one component, open; each kind of input implements it."""

    @property
    def kind(self) -> Kind:
        """Who wrote them."""

    @property
    def scheme(self) -> str | None:
        """What they are quantized to, as ``inspect`` says it."""

    @property
    def written_by(self) -> str | None:
        """The release that wrote them, or those that can have."""

    @property
    def tensors(self) -> Sequence[OldTensor]:
        """In the order of their data in the files."""

    @property
    def others(self) -> Mapping[str, str]:
        """What else the files hold that does not arrive: name → why."""

    @property
    def is_todays(self) -> bool:
        """Whether the libraries of today open them as they are, but for the config beside them."""

    @property
    def problems(self) -> Sequence[str]:
        """Tensors that have no counterpart that is known to be right, one line each."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is to be known of the old checkpoint."""

    def hash(self, begun: Mapping[str, FileDigest] = MappingProxyType({})) -> None:
        """From now on take the SHA-256 of the files, from what is read of them; some may be hashed in part already."""

    def marks(self) -> Mapping[str, Mark]:
        """How far each file was hashed of which something was read since the last call."""

    def digests(self) -> Mapping[str, str]:
        """The SHA-256 of each file, by its path in the source; what was not read is read now.

        Raises:
            ReadError: a file changed meanwhile.
        """

    def close(self) -> None:
        """Release the files."""
