"""What a ``.bin`` holds, as frozen values: nothing of it is a live torch or torchao object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

Value: TypeAlias = (
    "bool | int | float | str | bytes | tuple[Value, ...] | Mapping[str | int, Value]"
    " | Symbol | Instance | BinTensor | None"
)
"""Plain data from a pickle. Lists, tuples and ``torch.Size`` are tuples; dicts of any class are mappings."""


@dataclass(frozen=True)
class Symbol:
    """A dtype (``torch.int4``), a layout (``torch.strided``) or a function held as a value, by dotted name."""

    name: str


@dataclass(frozen=True)
class Instance:
    """An object: a granularity, activation settings, an enum member, a device, a set, an old ``functools.partial``.

    Attributes:
        class_name: dotted.
        args: what it was made with: the value of an enum member, the fields of a named tuple, the items of a set.
        state: its attributes.
    """

    class_name: str
    args: tuple[Value, ...] = ()
    state: Mapping[str | int, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredData:
    """The elements of a plain tensor.

    Attributes:
        storage: key of the storage that holds them.
        offset: byte in the file of the first element; ``None`` while the storage's place is not known.
        nbytes: elements times bytes an element.
        storage_offset: elements before the first one in the storage.
        stride: elements from one index to the next, by dimension.
    """

    storage: str
    offset: int | None
    nbytes: int
    storage_offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True)
class BinTensor:
    """A tensor, plain or of a torchao class.

    Attributes:
        class_name: dotted, as pickled; ``torch.Tensor`` or ``torch.nn.parameter.Parameter`` for a plain one.
        dtype: what it appears as, without ``torch.``.
        shape: what it appears as.
        data: where its elements lie; ``None`` for a torchao class, whose elements are its inner tensors'.
        inner: the tensors among its attributes, by attribute name, in the pickle's order.
        attributes: its other attributes, in the pickle's order.
        requires_grad: as stored.
        location: device its data was saved from (``cpu``, ``cuda:0``).
        values: in it, itself among them, one that is shared each time.
        depth: of what lies within each other in it.
    """

    class_name: str
    dtype: str
    shape: tuple[int, ...]
    data: StoredData | None
    inner: Mapping[str, BinTensor]
    attributes: Mapping[str, Value]
    requires_grad: bool
    location: str
    values: int = field(default=1, repr=False, compare=False)
    depth: int = field(default=0, repr=False, compare=False)

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, BinTensor]]:
        """Dotted attribute names and plain tensors within, at any depth; itself, as ``""``, when it is plain."""
        if self.data is not None:
            yield prefix, self
        for name, tensor in self.inner.items():
            yield from tensor.leaves(f"{prefix}.{name}" if prefix else name)

    @property
    def place(self) -> tuple[object, ...]:
        """Which elements it stands for: the same for tensors that share all of them."""
        return tuple((leaf.data, leaf.dtype, leaf.shape) for _, leaf in self.leaves())

    @property
    def nbytes(self) -> int:
        """Bytes of all elements stored for it."""
        return sum(tensor.data.nbytes for _, tensor in self.leaves() if tensor.data is not None)


@dataclass(frozen=True)
class StorageInfo:
    """A storage that the pickle names.

    Attributes:
        location: device it was saved from.
        dtype: of its elements, ``uint8`` when it is untyped.
        numel: elements.
        offset: byte in the file where it starts; ``None`` while that is not known.
        size: bytes.
    """

    location: str
    dtype: str
    numel: int
    offset: int | None
    size: int


@dataclass(frozen=True)
class GlobalUse:
    """A name in the pickle.

    Attributes:
        name: dotted.
        position: byte in ``data.pkl`` of the opcode that names it first.
        legacy: torchao 0.18 does not register it: the file can be shown, not loaded.
    """

    name: str
    position: int
    legacy: bool


@dataclass(frozen=True)
class BinContents:
    """Everything a ``.bin`` says of itself without its elements.

    Attributes:
        tensors: by name, in the file's order.
        others: what else lies beside them in the top dict (step counts, nested dicts of a training checkpoint).
        globals: every name in the pickle, sorted.
        storages: by key.
        protocol: pickle protocol.
        byteorder: ``little`` or ``big``.
        archive: a zip archive, as torch writes since 1.6; an older file cannot be mapped.
    """

    tensors: Mapping[str, BinTensor]
    others: Mapping[str | int, Value]
    globals: tuple[GlobalUse, ...]
    storages: Mapping[str, StorageInfo]
    protocol: int
    byteorder: str
    archive: bool = True

    @property
    def legacy(self) -> tuple[GlobalUse, ...]:
        """The names that torchao 0.18 does not register."""
        return tuple(use for use in self.globals if use.legacy)
