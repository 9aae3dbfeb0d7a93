"""What names, calls and persistent ids in a checkpoint's pickle mean, checked as they are read.

Only the shapes of call that ``torch.save`` writes are accepted, even for names on the list: a call is checked when it
stands there, since a real unpickler would run it there, whatever becomes of its result. Tensors are checked against the
storages of the archive: torch itself trusts sizes, strides and offsets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from aoconvert.formats.torch_bin.contents import BinTensor, GlobalUse, Instance, StorageInfo, StoredData, Symbol, Value
from aoconvert.formats.torch_bin.pickle_vm import Members, PickledItems, PickledPairs, refuse, show
from aoconvert.formats.torch_bin.safe_names import ITEMSIZE, STORAGE_DTYPE, Kind, Known, lookup
from aoconvert.formats.torch_bin.zip_reader import Record

MAX_DEPTH = 50  # containers and tensors within each other
MAX_VALUES = 2_000_000
_FREE_VALUES = 20_000
_BYTES_PER_VALUE = 2  # torch writes at least five for each, by this count
_CALL = 4  # values that the result of a call takes the memory of, about
MAX_DIMS = 64
MAX_ELEMENTS_PER_BYTE = (
    64  # of a torchao tensor, over what is stored for it; 1-bit codes reach 8, codebooks a little more
)

_TOO_MUCH = "values are nested too deeply, or repeat each other too often"
_KEY = re.compile(r"[0-9]{1,20}", re.ASCII)
_LOCATION = re.compile(r"[a-z]{1,16}(?::[0-9]{1,3})?", re.ASCII)
_LIST_HINT = "only torch's and torchao's own names belong in a checkpoint; get the file from its author as safetensors"
_PARAMETER = "torch.nn.parameter.Parameter"
# What torch.Tensor has a setter for: such a state would make another tensor of it than the one described here.
_SETTERS = frozenset(
    (
        *("data", "grad", "grad_dtype", "imag", "names", "real", "requires_grad", "volatile"),
        *("_backward_hooks", "_grad", "_grad_fn", "_post_accumulate_grad_hooks"),
    )
)


@dataclass(frozen=True)
class Name:
    """A name on the list."""

    dotted: str
    known: Known

    @property
    def kind(self) -> Kind:
        """What it may be used for."""
        return self.known.kind


@dataclass(frozen=True)
class StorageRecord:
    """A storage, as a persistent id names it."""

    key: str
    info: StorageInfo


class Rebuilt:
    """An object under construction; ``sealed`` once it has been used. ``inside``: what its parts froze to."""

    __slots__ = ("args", "inside", "name", "sealed", "state")

    def __init__(self, name: Name, args: tuple[Value, ...], inside: list[Frozen]) -> None:
        self.name = name
        self.args = args
        self.inside = inside
        self.state: Mapping[str | int, Value] | None = None
        self.sealed = False


@dataclass(frozen=True)
class Frozen:
    """A value that is final. ``values``: in it, shared ones each time; ``depth``: of those within each other."""

    value: Value
    values: int = 1
    depth: int = 0


class Rebuilder:
    """The ``Actions`` of a checkpoint over the storage records of its archive.

    What is shared is frozen once, but counts each time it is met: so it does for all who walk the result. How much
    may be made is in proportion to the pickle.

    Args:
        records: storages, by key.
        pickle_bytes: size of the pickle.
        expanded: accept tensors that repeat their elements (``Tensor.expand``).
    """

    def __init__(self, records: Mapping[str, Record], pickle_bytes: int, *, expanded: bool = False) -> None:
        self._records = records
        self._expanded = expanded
        self._left = min(MAX_VALUES, _FREE_VALUES + pickle_bytes // _BYTES_PER_VALUE)
        self._known: dict[int, tuple[object, Frozen]] = {}  # by id of what was frozen, which is kept with it
        self.uses: dict[str, GlobalUse] = {}
        self.storages: dict[str, StorageInfo] = {}

    # --- Actions

    def name(self, module: str, name: str, position: int) -> object:
        """A name on the list."""
        dotted = f"{module}.{name}"
        known = lookup(module, name)
        if known is None:
            raise refuse(position, f"{show(dotted)} is not a name that a checkpoint may use", hint=_LIST_HINT)
        self.uses.setdefault(dotted, GlobalUse(dotted, position, known.legacy))
        return Name(dotted, known)

    def persistent(self, pid: object, position: int) -> object:
        """A storage that is in the archive, of the size that the id says."""
        match pid:
            case ("storage", Name(dotted, Known(Kind.STORAGE)), str(key), str(location), int(numel)):
                pass
            case _:
                raise refuse(position, "a persistent id that is not a storage")
        if not _KEY.fullmatch(key) or not _LOCATION.fullmatch(location) or not _is_size(numel):
            raise refuse(position, f"a storage called '{show(key)}' on '{show(location)}' of {numel} elements")
        record = self._records.get(key)
        if record is None:
            raise refuse(position, f"storage {key} is not in the archive")
        dtype = STORAGE_DTYPE[dotted]
        if numel * ITEMSIZE[dtype] != record.size:
            wanted = numel * ITEMSIZE[dtype]
            raise refuse(position, f"storage {key} has {record.size:,} bytes in the archive, {wanted:,} in the pickle")
        info = StorageInfo(location, dtype, numel, record.offset, record.size)
        if self.storages.setdefault(key, info) != info:
            raise refuse(position, f"storage {key} is named twice in different ways")
        return StorageRecord(key, info)

    def call(self, func: object, args: tuple[object, ...], position: int) -> object:
        """The result of a call that torch.save writes."""
        if not isinstance(func, Name):
            raise refuse(position, "something that is not a name is called")
        self._spend(_CALL, position)
        match func.kind, args:
            case Kind.ORDERED_DICT, ():
                return PickledPairs(ordered=True)
            case Kind.SET, (PickledItems() as items,):
                items.sealed = True
                return Instance("builtins.set", tuple(self._primitive(item, position) for item in items.values))
            case Kind.ENUM, (value,):
                return Instance(func.dotted, (self._primitive(value, position),))
            case Kind.LAYOUT, ("torch.strided",):
                return Symbol("torch.strided")
            case Kind.SIZE, (sizes,):
                return self._sizes(sizes, position)
            case Kind.DEVICE, (str(device),) if _LOCATION.fullmatch(device):
                return Instance(func.dotted, (device,))
            case Kind.DEVICE, (str(device), int(index)) if _LOCATION.fullmatch(device) and 0 <= index < 1000:
                return Instance(func.dotted, (f"{device}:{index}",))
            case Kind.PARTIAL, (Name() as inner,) if inner.kind is Kind.FUNCTION:
                return Rebuilt(func, (Symbol(inner.dotted),), [])
            case Kind.REBUILD, _:
                return self._dense(func, args, position)
            case Kind.PARAMETER, _:
                return self._parameter(func, args, position)
            case Kind.FROM_TYPE, (Name() as inner, Name() as cls, tuple() as inner_args, state):
                return self._from_type(inner, cls, inner_args, state, position)
        raise refuse(position, f"{func.dotted} is called in a way that torch.save never writes")

    def new(self, cls: object, args: tuple[object, ...], position: int) -> object:
        """An object of a class for plain data."""
        if not isinstance(cls, Name):
            raise refuse(position, "an object is made from something that is not a name")
        if (cls.kind is Kind.DATA and not args) or (cls.kind is Kind.TUPLE and len(args) <= 16):
            self._spend(_CALL, position)
            inside = [self._freeze(arg, position, 0) for arg in args]
            return Rebuilt(cls, tuple(item.value for item in inside), inside)
        raise refuse(position, f"an object of {cls.dotted} is made in a way that torch.save never writes")

    def build(self, target: object, state: object, position: int) -> None:
        """The attributes of a data object, of an ``OrderedDict`` (dropped), or the settings of a ``partial``."""
        if isinstance(target, PickledPairs) and target.ordered:
            self._attributes(state, position)
            return
        if not isinstance(target, Rebuilt) or target.sealed or target.state is not None:
            raise refuse(position, "a state is given to something that has none, or has it already, or is in use")
        if target.name.kind is Kind.PARTIAL:
            frozen = self._partial(target, state, position)
        elif target.name.kind is Kind.DATA:
            frozen = self._attributes(state, position)
        else:
            raise refuse(position, f"a state is given to {target.name.dotted}, which has none")
        target.state = cast("Mapping[str | int, Value]", frozen.value)
        target.inside.append(frozen)

    # --- values

    def freeze(self, value: object, position: int) -> Value:
        """``value`` as frozen plain data; what it is made of can no longer be changed."""
        frozen = self._freeze(value, position, 0)
        self._spend(frozen.values, position)
        return frozen.value

    def _spend(self, values: int, position: int) -> None:
        self._left -= values
        if self._left < 0:
            raise refuse(position, _TOO_MUCH)

    def _freeze(self, value: object, position: int, depth: int) -> Frozen:
        """``depth``: of what it lies in."""
        if value is None or isinstance(value, (bool, int, float, str, bytes, Symbol)):
            return Frozen(value)
        if isinstance(value, Instance):
            return Frozen(value, 1 + len(value.args))
        if isinstance(value, BinTensor):
            found = Frozen(value, value.values, value.depth)
        elif id(value) in self._known:
            found = self._known[id(value)][1]
        elif depth > MAX_DEPTH:
            raise refuse(position, _TOO_MUCH)
        else:
            found = self._open(value, position, depth)
            self._known[id(value)] = (value, found)
        if depth + found.depth > MAX_DEPTH:
            raise refuse(position, _TOO_MUCH)
        return found

    def _open(self, value: object, position: int, depth: int) -> Frozen:
        """A container, which is sealed, or a name that stands for a value; met for the first time."""
        if isinstance(value, (PickledItems, PickledPairs, Members, Rebuilt)):
            value.sealed = True
        match value:
            case Rebuilt():
                return self._join(Instance(value.name.dotted, value.args, value.state or {}), value.inside, position)
            case Members():
                members = tuple(self._primitive(item, position) for item in value.values)
                return Frozen(Instance("builtins.set", members), 1 + len(members))
            case PickledPairs():
                inside = [self._freeze(item, position, depth + 1) for item in value.values.values()]
                made = dict(zip(value.values, (item.value for item in inside), strict=True))
                return self._join(made, inside, position)
            case PickledItems() | tuple():
                items = value.values if isinstance(value, PickledItems) else value
                inside = [self._freeze(item, position, depth + 1) for item in items]
                return self._join(tuple(item.value for item in inside), inside, position)
            case Name(dotted, Known(Kind.DTYPE | Kind.FUNCTION)):
                return Frozen(Symbol(dotted))
        what = value.dotted if isinstance(value, Name) else "a storage"
        raise refuse(position, f"{what} is used as a value")

    def _join(self, value: Value, inside: Sequence[Frozen], position: int) -> Frozen:
        """A container of what is ``inside``."""
        self._spend(1 + len(inside), position)
        return Frozen(value, 1 + sum(item.values for item in inside), 1 + max((i.depth for i in inside), default=0))

    def _primitive(self, value: object, position: int) -> Value:
        frozen = self.freeze(value, position)
        if frozen is None or isinstance(frozen, (bool, int, float, str)):
            return frozen
        raise refuse(position, "an enum member or a set item that is not a number or a string")

    def _attributes(self, state: object, position: int) -> Frozen:
        """A dict of attributes."""
        if not isinstance(state, PickledPairs):
            raise refuse(position, "a state that is not a dict")
        for key in state.values:
            if not isinstance(key, str) or not key.isidentifier() or key.startswith("__"):
                raise refuse(position, f"an attribute called '{show(str(key))}'")
        return self._freeze(state, position, 0)

    def _partial(self, target: Rebuilt, state: object, position: int) -> Frozen:
        """``functools.partial.__reduce__``: (function, args, keywords, attributes)."""
        match state:
            case (Name() as func, (), PickledPairs() as keywords, None) if (Symbol(func.dotted),) == target.args:
                return self._attributes(keywords, position)
        raise refuse(position, "functools.partial over more than keywords")

    def _sizes(self, value: object, position: int) -> tuple[int, ...]:
        if isinstance(value, PickledItems):
            value.sealed = True
            value = tuple(value.values)
        if not isinstance(value, tuple) or len(value) > MAX_DIMS or not all(_is_size(item) for item in value):
            raise refuse(position, "a shape, stride or size that is not a tuple of whole numbers")
        return cast("tuple[int, ...]", value)

    # --- tensors

    def _dense(self, func: Name, args: tuple[object, ...], position: int) -> BinTensor:
        """``_rebuild_tensor[_v2|_v3](storage, offset, size, stride[, requires_grad, hooks[, dtype][, metadata]])``."""
        name = func.dotted.rpartition(".")[2]
        rest = args[4:]
        dtype: str | None = None
        shape_ok = not rest if name == "_rebuild_tensor" else len(rest) >= 2
        if name == "_rebuild_tensor_v3" and len(rest) >= 3:
            dtype = _dtype(rest[2], position)
            rest = (*rest[:2], *rest[3:])
        elif name == "_rebuild_tensor_v3":
            shape_ok = False
        if not shape_ok or len(args) < 4 or not isinstance(args[0], StorageRecord) or len(rest) > 3:
            raise refuse(position, f"{func.dotted} is called in a way that torch.save never writes")
        requires_grad = self._grad_and_hooks(rest, position) if rest else False
        if len(rest) == 3 and rest[2] is not None and any(self._metadata(rest[2], position)):
            raise refuse(position, "a tensor that is to be conjugated or negated when it is read")
        storage = args[0]
        data = self._find_data(storage, args[1], args[2], args[3], dtype or storage.info.dtype, position)
        shape = self._sizes(args[2], position)
        location = storage.info.location
        return BinTensor("torch.Tensor", dtype or storage.info.dtype, shape, data, {}, {}, requires_grad, location)

    def _metadata(self, value: object, position: int) -> Iterable[Value]:
        """The marks of a dense tensor (``torch._utils.get_tensor_metadata``): ``conj`` and ``neg``."""
        return cast("Mapping[str, Value]", self._attributes(value, position).value).values()

    def _grad_and_hooks(self, args: tuple[object, ...], position: int) -> bool:
        requires_grad, hooks = args[0], args[1]
        if not isinstance(requires_grad, bool) or not isinstance(hooks, PickledPairs) or hooks.values:
            raise refuse(position, "a tensor with hooks, or without a flag for its gradient")
        hooks.sealed = True
        return requires_grad

    def _find_data(
        self, storage: StorageRecord, offset: object, size: object, stride: object, dtype: str, position: int
    ) -> StoredData:
        """The elements of a dense tensor, which must all lie in its storage, and be no more unless they may repeat."""
        shape, steps = self._sizes(size, position), self._sizes(stride, position)
        if type(offset) is not int or not _is_size(offset) or len(shape) != len(steps):
            raise refuse(position, "a tensor whose shape, stride and offset do not belong together")
        width = ITEMSIZE[dtype]
        held = storage.info.size // width
        count = math.prod(shape)
        last = offset + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
        if (count > held and not self._expanded) or offset > held or (count and last >= held):
            raise refuse(
                position,
                f"a {dtype} tensor of {_number(count)} elements (shape {_clip(shape)}, stride {_clip(steps)},"
                f" offset {offset:,}) over storage {storage.key}, which holds {held:,}",
            )
        start = storage.info.offset
        place = None if start is None else start + offset * width
        return StoredData(storage.key, place, count * width, offset, steps)

    def _parameter(self, func: Name, args: tuple[object, ...], position: int) -> BinTensor:
        """``_rebuild_parameter(data, requires_grad, hooks)``, ``_with_state``: and the attributes."""
        count = 4 if func.dotted.endswith("_with_state") else 3
        if len(args) != count or not isinstance(args[0], BinTensor):
            raise refuse(position, f"{func.dotted} is called in a way that torch.save never writes")
        tensor = args[0]
        name = _PARAMETER if tensor.class_name == "torch.Tensor" else tensor.class_name
        tensor = replace(tensor, class_name=name, requires_grad=self._grad_and_hooks(args[1:3], position))
        return self._with_state(tensor, args[3], position) if count == 4 else tensor

    def _with_state(self, tensor: BinTensor, state: object, position: int) -> BinTensor:
        if state is None:
            return tensor
        frozen = self._attributes(state, position)
        values = cast("Mapping[str, Value]", frozen.value)
        count, depth = tensor.values + frozen.values, max(tensor.depth, 1 + frozen.depth)
        self._spend(count, position)
        if depth > MAX_DEPTH:
            raise refuse(position, _TOO_MUCH)
        for name in _SETTERS.intersection(values):
            raise refuse(position, f"an attribute called '{name}', which would change the tensor itself")
        inner = {name: value for name, value in values.items() if isinstance(value, BinTensor)}
        attributes = {name: value for name, value in values.items() if not isinstance(value, BinTensor)}
        return replace(
            tensor,
            inner={**tensor.inner, **inner},
            attributes={**tensor.attributes, **attributes},
            values=count,
            depth=depth,
        )

    def _from_type(self, func: Name, cls: Name, args: tuple[object, ...], state: object, position: int) -> BinTensor:
        """``_rebuild_from_type_v2(func, type, args, state)``: a subclass, or a tensor with attributes."""
        if func.kind is Kind.REBUILD and cls.kind is Kind.PLAIN_TENSOR:
            tensor = replace(self._dense(func, args, position), class_name=cls.dotted)
            return self._with_state(tensor, state, position)
        if func.kind is not Kind.WRAPPER or cls.kind is not Kind.TENSOR:
            raise refuse(position, f"{cls.dotted} is rebuilt by {func.dotted}")
        tensor = self._with_state(self._wrapper(cls, args, position), state, position)
        count = math.prod(tensor.shape)
        if count > tensor.nbytes * MAX_ELEMENTS_PER_BYTE:
            raise refuse(position, f"a {cls.dotted} of {_number(count)} elements over {tensor.nbytes:,} bytes")
        return tensor

    def _wrapper(self, cls: Name, args: tuple[object, ...], position: int) -> BinTensor:
        """``_rebuild_wrapper_subclass(cls, dtype, size, stride, offset, layout, device, requires_grad)``."""
        match args:
            case (
                Name() as same, dtype, size, stride, int(offset),
                Symbol("torch.strided"), Instance("torch.device", (str(device),)), bool(requires_grad),
            ) if same.dotted == cls.dotted and _is_size(offset):  # fmt: skip
                shape = self._sizes(size, position)
                if len(self._sizes(stride, position)) == len(shape):
                    name = _dtype(dtype, position)
                    return BinTensor(cls.dotted, name, shape, None, {}, {}, requires_grad, device)
        raise refuse(position, f"{cls.dotted} is rebuilt in a way that torch.save never writes")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _dtype(value: object, position: int) -> str:
    if isinstance(value, Name) and value.kind is Kind.DTYPE:
        return value.dotted.removeprefix("torch.")
    raise refuse(position, "a tensor without a dtype")


def _number(count: int) -> str:
    return f"{count:,}" if count < 1 << 63 else "more than 2**63"


def _clip(values: tuple[int, ...]) -> str:
    return str(values if len(values) <= 8 else (*values[:8], "...")).replace("'", "")
