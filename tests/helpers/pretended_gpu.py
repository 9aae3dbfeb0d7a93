"""A pretended GPU: it shows, on a machine without one, what the *host's* side of the GPU path does wrong.

A tensor on ``cuda:0`` (or ``xpu:1``) is a wrapper around a tensor of the CPU, on which every operation runs at once.
What is late on a GPU is late here too, as late as its rules allow:

- a copy from page-locked memory has read it only when its stream has been waited for; a source that holds something
  else by then is a ``Mistake``;
- a copy into page-locked memory fills it with poison, and the values come when its stream is waited for;
- an Intel GPU does both with ordinary memory, too, and with the temporaries by way of which torch copies what is not
  contiguous or of another dtype;
- a tensor that is used on another stream than its own, which has not been waited for, is a ``Mistake``; tensors of
  several devices in one operation are torch's own error;
- a device has so many bytes, and torch's own error for more; a device can be taken, or fail.

It proves: waits, reuse of buffers, order, placement, how blocks are put together, what becomes of a full device, and
how many bytes of tensors are on a device at once. It does not prove: the bits of a GPU's kernels (logarithms,
powers, sums, the packing of int4), what torch's allocators, contexts and drivers really do, any speed, or races of
real threads.

Nothing of torch is replaced: the wrapper is a tensor subclass, and two modes catch what asks for such a device.
torch has to be built for the CPU, and is told that it need not look for a driver. Of aoconvert the one module that
talks to drivers is replaced, ``aoconvert.accelerators``. ``tests/engine/test_pretended_gpu.py`` plants mistakes that
have to be seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from aoconvert import accelerators
from aoconvert.schemes import tile_packing

aten = torch.ops.aten
POISON = 0xA5
ROUNDED = 512  # torch's allocators hand out multiples of it


class Mistake(BaseException):
    """A program that does this to a GPU gets wrong numbers, now and then. No ``except Exception`` hides it."""


class Stream:
    """A queue of a device: work in order, none of it surely done before somebody waits."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.device = device
        self._world = world
        self._work: deque[Callable[[], Any]] = deque()
        self._begun = self._done = 0
        self._before: list[Stream] = []

    def add(self, work: Callable[[], Any] = lambda: None) -> None:
        self._work.append(work)
        self._begun += 1

    def wait(self, until: int) -> None:
        while self._done < until:
            self._done += 1
            self._work.popleft()()

    def synchronize(self) -> None:
        self.wait(self._begun)

    def record_event(self) -> Event:
        return Event(self, self._begun)

    @property
    def finished(self) -> bool:
        return self._done == self._begun

    def __enter__(self) -> Stream:
        self._before.append(self._world.stream(self.device))
        self._world.current[self.device] = self
        return self

    def __exit__(self, *_: object) -> None:
        self._world.current[self.device] = self._before.pop()


@dataclass(frozen=True)
class Event:
    """A place in a stream."""

    stream: Stream
    until: int

    def synchronize(self) -> None:
        self.stream.wait(self.until)


@dataclass
class Memory:
    """Bytes of a device, and how many were used at once."""

    limit: int = 1 << 60
    used: int = 0
    peak: int = 0


@dataclass
class Block:
    """Memory of a device that tensors share: its bytes, its stream, how many tensors look at it."""

    nbytes: int
    stream: Stream
    tensors: int = 0


@dataclass
class World:
    """``count`` devices of a kind.

    Attributes:
        memory: of each device.
        contexts: devices that were used, as a driver would have set them up for the process.
        broken: device → the error of whatever is done on it.
        reciprocal: a tensor is divided by a number as CUDA does it, PyTorch's ``BinaryDivTrueKernel.cu``.
        lacks: dtypes that the devices cannot compute with.
        events: what happens before an upload, by how many there were.
        locked_bytes: page-locked memory that was asked for so far.
    """

    kind: str
    count: int
    memory: dict[torch.device, Memory] = field(default_factory=dict)
    contexts: set[torch.device] = field(default_factory=set)
    broken: dict[torch.device, Exception] = field(default_factory=dict)
    reciprocal: bool = False
    lacks: set[torch.dtype] = field(default_factory=set)
    events: dict[int, Callable[[], None]] = field(default_factory=dict)
    locked_bytes: int = 0
    _uploads: int = 0
    _streams: list[Stream] = field(default_factory=list)
    current: dict[torch.device, Stream] = field(default_factory=dict)
    _blocks: dict[int, Block] = field(default_factory=dict)
    _locked: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = {torch.device(self.kind, index): Memory() for index in range(self.count)}

    def limit(self, nbytes: int, index: int = 0) -> None:
        """Leave a device so many bytes beside what is used of it."""
        memory = self.memory[torch.device(self.kind, index)]
        memory.limit = memory.used + nbytes

    def device(self, name: Any) -> torch.device:
        """With its number; using it sets it up.

        Raises:
            Exception: that of a broken device.
        """
        device = torch.device(name)
        device = device if device.index is not None else torch.device(device.type, 0)
        if device in self.broken:
            raise self.broken[device]
        self.contexts.add(device)
        return device

    def stream(self, device: torch.device) -> Stream:
        return self.current.setdefault(device, Stream(self, device))

    def new_stream(self, device: torch.device) -> Stream:
        made = Stream(self, self.device(device))
        self._streams.append(made)
        return made

    def page_locked(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if not self.contexts:  # as torch does
            self.device(self.kind)
        made = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
        start, size = made.data_ptr(), made.untyped_storage().nbytes()
        self._locked[start] = start + size
        self.locked_bytes += size
        weakref.finalize(made.untyped_storage(), self._locked.pop, start, None)
        return made

    def is_late(self, host: torch.Tensor, non_blocking: bool) -> bool:
        """Whether a copy from or to this memory goes on when it has been begun."""
        place = host.data_ptr()
        locked = any(start <= place < stop for start, stop in list(self._locked.items()))
        return non_blocking and (locked or self.kind == "xpu")

    def give_back(self, device: torch.device) -> None:
        for stream in [self.stream(self.device(device)), *self._streams]:
            if stream.device == device:
                stream.synchronize()

    def peak_bytes(self, device: str) -> int:
        name = torch.device(device)  # asks torch, not the device
        return self.memory[torch.device(name.type, name.index or 0)].peak

    def hold(self, tensor: OnDevice) -> None:
        """Count a tensor's memory, until the last that looks at it is gone."""
        if tensor.dtype in self.lacks:
            raise RuntimeError("Required aspect fp64 is not supported on the device")
        storage = tensor.host.untyped_storage()
        place, device = storage.data_ptr(), tensor.device
        if not place:
            return
        if place not in self._blocks:
            nbytes, memory = -(-storage.nbytes() // ROUNDED) * ROUNDED, self.memory[device]
            if memory.used + nbytes > memory.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes")
            memory.used += nbytes
            memory.peak = max(memory.peak, memory.used)
            self._blocks[place] = Block(nbytes, self.stream(device))
        self._blocks[place].tensors += 1
        weakref.finalize(tensor, self._let_go, place, device)

    def _let_go(self, place: int, device: torch.device) -> None:
        block = self._blocks[place]
        block.tensors -= 1
        if not block.tensors:
            del self._blocks[place]
            self.memory[device].used -= block.nbytes

    def check(self, tensor: OnDevice) -> None:
        """Raises: Mistake: another stream may still be at work on it."""
        block = self._blocks.get(tensor.host.untyped_storage().data_ptr())
        if block is not None and block.stream is not self.stream(tensor.device) and not block.stream.finished:
            raise Mistake("a tensor of one stream is used on another, which has not waited for it")

    def upload(self, source: torch.Tensor, device: Any, dtype: torch.dtype | None, non_blocking: bool) -> torch.Tensor:
        """What of a tensor in host memory arrives, as a tensor of the CPU."""
        self.events.get(self._uploads, lambda: None)()
        self._uploads += 1
        stream = self.stream(self.device(device))
        if self.kind == "xpu" and non_blocking and not (source.is_contiguous() and dtype in (None, source.dtype)):
            raise Mistake("a copy goes on from a temporary that nobody holds")
        values = source.to(dtype or source.dtype, copy=True)
        if not self.is_late(source, non_blocking):
            stream.synchronize()
            return values
        before = source.clone()

        def settle() -> None:
            if not torch.equal(_bytes(before), _bytes(source)):
                raise Mistake("memory was written to before the copy from it was done")

        stream.add(settle)
        return values

    def download(self, source: OnDevice, target: torch.Tensor, non_blocking: bool) -> None:
        """Fill a tensor in host memory; one that is not contiguous is filled by way of another, and waited for."""
        self.check(source)
        stream = self.stream(source.device)
        straight = target.dtype == source.dtype and target.is_contiguous() and source.host.is_contiguous()
        if straight and self.is_late(target, non_blocking):
            values = source.host.clone()
            _bytes(target).fill_(POISON)
            stream.add(lambda: target.copy_(values))
        elif self.kind == "xpu" and non_blocking:  # torch has read its temporary before that was filled
            target.copy_(torch.full_like(source.host.view(torch.uint8), POISON).view(source.dtype))
        else:
            stream.synchronize()
            target.copy_(source.host)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


_WORLD: list[World] = []


class OnDevice(torch.Tensor):
    """A tensor on a pretended device; ``host`` holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, device: torch.device) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        made.host = host
        _WORLD[-1].hold(made)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.host!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        world, kwargs = _WORLD[-1], kwargs or {}
        if func is aten.copy_.default:
            return _copy(world, *args, **kwargs)
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            return _moved(world, args[0], kwargs["device"], kwargs.get("dtype"), kwargs.get("non_blocking", False))
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        device = next(tensor.device for tensor in tensors if isinstance(tensor, OnDevice))
        for tensor in tensors:
            if tensor.device != device and (tensor.dim() or tensor.device.type != "cpu"):
                raise RuntimeError(f"Expected all tensors to be on the same device: {tensor.device} and {device}")
            if isinstance(tensor, OnDevice):
                world.check(tensor)
        world.stream(world.device(device)).add()
        if func is aten._local_scalar_dense.default:
            world.stream(device).synchronize()
        if func is aten._convert_weight_to_int4pack.default:  # the CPU has another kernel of this name
            halves = args[0].host
            return OnDevice(tile_packing.pack(torch.stack((halves >> 4, halves & 15), -1).flatten(1), args[1]), device)
        if world.reciprocal and func is aten.div.Tensor and isinstance(args[1], (int, float)):
            return OnDevice(_by_reciprocal(args[0].host, args[1]), device)
        known = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
        done = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        return tree_map(lambda value: known[id(value)] if id(value) in known else _wrapped(value, device), done)


def _by_reciprocal(value: torch.Tensor, number: float) -> torch.Tensor:
    wide = value if value.dtype == torch.float64 else value.to(torch.float32)
    return (wide * (torch.ones((), dtype=wide.dtype) / torch.tensor(number, dtype=wide.dtype))).to(value.dtype)


def _host(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) and value.type != "meta" else value


def _wrapped(value: Any, device: torch.device) -> Any:
    return OnDevice(value, device) if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice) else value


def _copy(world: World, target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, OnDevice):
        world.download(source, target, non_blocking)
    elif isinstance(source, OnDevice):
        world.check(source)
        target.host.copy_(source.host)
        world.stream(target.device).add()
    else:
        world.check(target)
        target.host.copy_(world.upload(source, target.device, target.dtype, non_blocking))
    return target


def _moved(world: World, value: torch.Tensor, device: Any, dtype: torch.dtype | None, non_blocking: bool) -> Any:
    kind = torch.device(device).type
    if not isinstance(value, OnDevice):
        return OnDevice(world.upload(value, device, dtype, non_blocking), world.device(device))
    if kind == "meta":
        return value.host.to("meta", dtype or value.dtype)
    world.check(value)
    if kind == "cpu":
        world.stream(value.device).synchronize()
        return value.host.to(dtype or value.dtype, copy=True)
    return OnDevice(value.host.to(dtype or value.dtype, copy=True), world.device(device))


_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_READING = {
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__bool__,
    torch.Tensor.item,
    torch.Tensor.tolist,
}  # fmt: skip


@dataclass
class _Calls(TorchFunctionMode):
    """Calls that torch's C++ would take to a driver before any subclass is asked."""

    world: World

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is torch.Tensor.to and not hasattr(first, "__tensor_flatten__"):
            return self._to(func, args, kwargs)
        if isinstance(first, OnDevice) and func in _INDEXING | _READING | {torch.Tensor.contiguous}:
            return self._on_device(func, first, args[1:], kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == self.world.kind:
            return OnDevice(func(*args, **{**kwargs, "device": "cpu"}), self.world.device(device))
        return func(*args, **kwargs)

    def _to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        value = args[0]
        named = {key: kwargs[key] for key in kwargs if key != "copy"}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **named)
        if isinstance(value, OnDevice):
            if device is None or (device.type == self.world.kind and self.world.device(device) == value.device):
                return value if dtype in (None, value.dtype) else aten._to_copy.default(value, dtype=dtype)
            return _moved(self.world, value, device, dtype, non_blocking)
        if device is not None and device.type == self.world.kind:
            return _moved(self.world, value, device, dtype, non_blocking)
        return func(*args, **kwargs)

    def _on_device(self, func: Any, tensor: OnDevice, args: Any, kwargs: Any) -> Any:
        self.world.check(tensor)
        if func in _READING:
            self.world.stream(tensor.device).synchronize()
            return func(tensor.host, *args, **kwargs)
        self.world.stream(tensor.device).add()
        done = func(tensor.host, *tree_map(_host, args), **kwargs)
        return tensor if done is tensor.host else _wrapped(done, tensor.device)


@dataclass
class _Factories(TorchDispatchMode):
    """What makes tensors below the calls, as torchao's operators do that are written in Python."""

    world: World

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is None or torch.device(device).type != self.world.kind or OnDevice in types:
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return _moved(self.world, args[0], device, kwargs.get("dtype"), kwargs.get("non_blocking", False))
        return OnDevice(func(*args, **{**kwargs, "device": torch.device("cpu")}), self.world.device(device))


@contextlib.contextmanager
def pretended(kind: str = "cuda", count: int = 1) -> Iterator[World]:
    """A machine with ``count`` GPUs of a kind, for this thread."""
    world = World(kind, count)
    _WORLD.append(world)
    driver = {
        "count": lambda asked: count if asked == kind else 0,
        "name": lambda device: f"pretended {kind}",
        "capability": lambda device: (9, 0) if kind == "cuda" else None,
        "new_stream": world.new_stream,
        "page_locked": world.page_locked,
        "give_back": world.give_back,
        "peak_bytes": world.peak_bytes,
    }
    try:
        with (
            mock.patch.multiple(accelerators, **driver),
            mock.patch.object(getattr(torch, kind), "_initialized", True),
            _Factories(world),
            _Calls(world),
        ):
            yield world
    finally:
        _WORLD.remove(world)
