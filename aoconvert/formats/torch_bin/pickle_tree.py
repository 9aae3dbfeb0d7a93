"""What a pickle says about a tensor, as plain values: ``describe`` takes it from a tensor, ``emit`` writes it.

``torch.save`` pickles live objects, so it needs all of them at the end. Here each tensor is reduced to a tree of
primitives, ``Global``, ``Call`` and ``Storage`` when it passes, and is then free to go. The tree depends on values
only, never on object identity, so the same tensors give the same bytes however they were made.

The opcodes are those of pickle protocol 2 that ``torch._weights_only_unpickler`` knows (see ``pickletools`` for them).
"""

from __future__ import annotations

import copyreg
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import torch
from torch._tensor import _rebuild_from_type_v2
from torch._utils import (
    _rebuild_meta_tensor_no_storage,
    _rebuild_tensor_v2,
    _rebuild_tensor_v3,
    _rebuild_wrapper_subclass,
)

from aoconvert.formats.dtypes import dtype_name

Node: TypeAlias = "bool | int | float | str | tuple[Node, ...] | Items | Pairs | Global | Call | Storage | None"

StoreTensor: TypeAlias = Callable[[torch.Tensor], str]
"""Takes a tensor whose elements fill its storage, keeps or counts its bytes, and returns the storage's key."""


class CannotDescribe(TypeError):
    """A value has no place in a ``.bin`` file that must load with ``weights_only=True``."""


@dataclass(frozen=True)
class Global:
    """An importable class, function or dtype."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        """``module.name``, as ``torch.serialization`` lists it."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Items:
    """A list."""

    values: tuple[Node, ...]


@dataclass(frozen=True)
class Pairs:
    """A dict, in its order."""

    pairs: tuple[tuple[Node, Node], ...]


@dataclass(frozen=True)
class Call:
    """``func(*args)``, or ``func.__new__(func, *args)``; then the dict items, then the state (None: no state)."""

    func: Global
    args: tuple[Node, ...]
    new: bool = False
    pairs: tuple[tuple[Node, Node], ...] = ()
    state: Node = None


@dataclass(frozen=True)
class Storage:
    """A record of the archive: torch's persistent id ``("storage", kind, key, "cpu", numel)``."""

    kind: Global
    key: str
    numel: int


def describe(value: object, store: StoreTensor) -> Node:
    """Reduce ``value`` to a tree; the bytes of each plain tensor in it go to ``store``.

    Meta tensors are described as the CPU tensors they stand for.

    Raises:
        CannotDescribe: a value that is no tensor, primitive, container, enum, or picklable object; a device tensor.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[return-value]
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value, store)
    if type(value) is tuple:
        return tuple(describe(item, store) for item in value)
    if type(value) is list:
        return Items(tuple(describe(item, store) for item in value))
    if type(value) is dict:
        return Pairs(_describe_pairs(value.items(), store))
    if isinstance(value, Enum):
        # Python 3.11.2 reduces an enum through builtins.getattr, which weights_only must refuse
        return Call(_global(type(value)), (describe(value.value, store),))
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return _global(value)
    if isinstance(value, torch.dtype):
        return Global("torch", dtype_name(value))
    if isinstance(value, torch.device) and value.type == "meta":
        value = torch.device("cpu")
    return _describe_object(value, store)


def _global(value: Any) -> Global:
    module, name = value.__module__, value.__qualname__
    if "." in name:
        raise CannotDescribe(f"{module}.{name} is not defined at module level")
    return Global(module, name)


def _describe_pairs(pairs: Iterable[tuple[Any, Any]], store: StoreTensor) -> tuple[tuple[Node, Node], ...]:
    return tuple((describe(key, store), describe(item, store)) for key, item in pairs)


def _describe_object(value: object, store: StoreTensor) -> Node:
    """Any other object, through the reduction that pickle itself would use."""
    kind = type(value)
    try:
        reducer = copyreg.dispatch_table.get(kind)
        reduced = value.__reduce_ex__(2) if reducer is None else reducer(value)
    except TypeError as error:
        raise CannotDescribe(f"a {kind.__module__}.{kind.__qualname__} cannot be pickled") from error
    if isinstance(reduced, str):
        raise CannotDescribe(f"a {kind.__module__}.{kind.__qualname__} is pickled by its name only")
    func, args, state, items, pairs = (*reduced, None, None, None)[:5]
    if items is not None and any(True for _ in items):
        raise CannotDescribe(f"a {kind.__module__}.{kind.__qualname__} holds list items")
    new = func is copyreg.__newobj__  # type: ignore[attr-defined]
    if new:
        func, args = args[0], args[1:]
    if not isinstance(func, (type, FunctionType, BuiltinFunctionType)):
        raise CannotDescribe(f"a {kind.__module__}.{kind.__qualname__} is rebuilt by {func!r}")
    return Call(
        _global(func),
        tuple(describe(arg, store) for arg in args),
        new,
        _describe_pairs(pairs or (), store),
        describe(state, store),
    )


def _describe_tensor(tensor: torch.Tensor, store: StoreTensor) -> Call:
    if tensor.device.type not in ("cpu", "meta"):
        raise CannotDescribe(f"it is on {tensor.device}, not in host memory")
    func, args = _reduce(tensor)
    if func is _rebuild_from_type_v2:  # a subclass, or a tensor with Python attributes
        inner, kind, inner_args, state = args
        rebuilt = _describe_rebuild(tensor, inner, inner_args, store)
        return Call(_global(func), (rebuilt.func, _global(kind), rebuilt.args, describe(state, store)))
    return _describe_rebuild(tensor, func, args, store)


def _reduce(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    func, args = tensor.__reduce_ex__(2)[:2]  # type: ignore[no-untyped-call]
    return func, args


def _describe_rebuild(tensor: torch.Tensor, func: Any, args: tuple[Any, ...], store: StoreTensor) -> Call:
    """The call that makes ``tensor`` without its Python attributes."""
    if func is _rebuild_meta_tensor_no_storage and is_wrapper(tensor):
        func = _rebuild_wrapper_subclass
        args = (
            type(tensor), tensor.dtype, tuple(tensor.size()), tensor.stride(), tensor.storage_offset(),
            tensor.layout, tensor.device, tensor.requires_grad,
        )  # fmt: skip
    if func in (_rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_meta_tensor_no_storage):
        return _describe_dense(tensor, store)
    return Call(_global(func), tuple(describe(arg, store) for arg in args))


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a wrapper subclass: inner tensors and no storage of its own, as every torchao class."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _describe_dense(tensor: torch.Tensor, store: StoreTensor) -> Call:
    data = own_storage(tensor)
    # an empty tensor of the dtype shows how this torch rebuilds it; on meta there is no storage to ask
    func, args = _reduce(torch.empty(0, dtype=tensor.dtype))
    if isinstance(args[0], torch.UntypedStorage):
        kind, numel = Global("torch.storage", "UntypedStorage"), data.untyped_storage().nbytes()
    else:
        kind, numel = Global("torch", args[0]._pickle_storage_type()), data.numel()
    layout = (int(data.storage_offset()), tuple(data.size()), tuple(data.stride()), tensor.requires_grad)
    rest = tuple(describe(arg, store) for arg in args[len(layout) + 1 :])
    return Call(_global(func), (Storage(kind, store(data), numel), *layout, *rest))


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as a plain tensor that fills its storage: itself, or a contiguous copy of a view."""
    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
    if plain.nbytes == plain.untyped_storage().nbytes():
        return plain
    return plain.clone(memory_format=torch.contiguous_format)


def globals_of(node: Node) -> Iterator[str]:
    """Dotted names of every class and function in the tree, with repetitions."""
    if isinstance(node, Global):
        yield node.dotted
    elif isinstance(node, Storage):
        yield node.kind.dotted
    else:
        for child in _children(node):
            yield from globals_of(child)


def storages_of(node: Node) -> Iterator[Storage]:
    """Every storage in the tree."""
    if isinstance(node, Storage):
        yield node
    else:
        for child in _children(node):
            yield from storages_of(child)


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, tuple):
        yield from node
    elif isinstance(node, Items):
        yield from node.values
    elif isinstance(node, Pairs):
        yield from (child for pair in node.pairs for child in pair)
    elif isinstance(node, Call):
        yield from (node.func, *node.args, Pairs(node.pairs), node.state)


@dataclass
class _Emitter:
    """Writes nodes as opcodes; strings and globals are remembered by value and written once."""

    out: bytearray = field(default_factory=bytearray)
    memo: dict[str | Global, int] = field(default_factory=dict)

    def emit(self, node: Node) -> None:
        match node:
            case None:
                self.out += pickle.NONE
            case bool():
                self.out += pickle.NEWTRUE if node else pickle.NEWFALSE
            case int():
                self._int(node)
            case float():
                self.out += pickle.BINFLOAT + struct.pack(">d", node)
            case str():
                text = node.encode("utf-8", "surrogatepass")
                self._once(node, pickle.BINUNICODE + struct.pack("<I", len(text)) + text)
            case Global():
                self._once(node, pickle.GLOBAL + f"{node.module}\n{node.name}\n".encode())
            case tuple():
                self._tuple(node)
            case Items(values):
                self.out += pickle.EMPTY_LIST
                self._put_marked(values, pickle.APPENDS)
            case Pairs(pairs):
                self.out += pickle.EMPTY_DICT
                self._pairs(pairs)
            case Call():
                self._call(node)
            case Storage(kind, key, numel):
                self._tuple(("storage", kind, key, "cpu", numel))
                self.out += pickle.BINPERSID

    def _once(self, value: str | Global, opcodes: bytes) -> None:
        index = self.memo.get(value)
        if index is None:
            index = self.memo[value] = len(self.memo)
            short, long = pickle.BINPUT, pickle.LONG_BINPUT
            self.out += opcodes
        else:
            short, long = pickle.BINGET, pickle.LONG_BINGET
        self.out += short + bytes([index]) if index < 256 else long + struct.pack("<I", index)

    def _int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += pickle.BININT1 + bytes([value])
        elif 0 <= value < 1 << 16:
            self.out += pickle.BININT2 + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += pickle.BININT + struct.pack("<i", value)
        else:
            digits = pickle.encode_long(value)
            self.out += pickle.LONG1 + bytes([len(digits)]) + digits

    def _put_marked(self, values: Iterable[Node], close: bytes) -> None:
        """Nothing for no values: an empty batch is not worth two opcodes."""
        opened = False
        for value in values:
            if not opened:
                self.out += pickle.MARK
                opened = True
            self.emit(value)
        if opened:
            self.out += close

    def _pairs(self, pairs: tuple[tuple[Node, Node], ...]) -> None:
        self._put_marked((node for pair in pairs for node in pair), pickle.SETITEMS)

    def _tuple(self, values: tuple[Node, ...]) -> None:
        if not values:
            self.out += pickle.EMPTY_TUPLE
        elif len(values) <= 3:
            for value in values:
                self.emit(value)
            self.out += (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)[len(values) - 1]
        else:
            self._put_marked(values, pickle.TUPLE)

    def _call(self, call: Call) -> None:
        self.emit(call.func)
        self._tuple(call.args)
        self.out += pickle.NEWOBJ if call.new else pickle.REDUCE
        self._pairs(call.pairs)
        if call.state is not None:
            self.emit(call.state)
            self.out += pickle.BUILD


def emit(node: Node) -> bytes:
    """The protocol 2 pickle of ``node``."""
    emitter = _Emitter()
    emitter.out += pickle.PROTO + b"\x02"
    emitter.emit(node)
    emitter.out += pickle.STOP
    return bytes(emitter.out)
