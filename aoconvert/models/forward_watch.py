"""A model's own forward, watched: how many rows each weight is multiplied with, and what its tensor class cannot do.

Every function of torch that a forward calls passes by a ``TorchFunctionMode`` before a tensor subclass sees it. There a
weight is known by its identity, and so is what is made of it (``weight.T``) as long as that is of a subclass, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch.nn import Module
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

_MOST = 1 << 24  # values of a tensor that are made where a function wants them
_DEVICE: Any = torch.Tensor.device.__get__


class Watch(TorchFunctionMode):
    """What happens to the weights while this is active.

    A call that a quantized weight cannot take is noted, and made with a plain tensor in its place, so that one forward
    finds all of them.

    Args:
        weights: state-dict key → the weight in the model.
        values: the model's large tensors are on ``meta``, all else is on the CPU, and what comes of both is zeros
            there. For a forward that looks at values, which ``meta`` tensors do not have.

    Attributes:
        rows: key of a weight → most rows that a call of ``linear`` multiplied it with.
        faults: key of a weight → where it is used in a way that its class does not know, in words.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], *, values: bool) -> None:
        super().__init__()
        self.rows: dict[str, int] = {}
        self.faults: dict[str, str] = {}
        self._values = values
        # the tensor is kept, so that no other can have its id
        self._known = {id(weight): (weight, frozenset({name})) for name, weight in weights.items()}
        self._usual: dict[tuple[Any, ...], bool] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """One call."""
        kwargs = kwargs or {}
        if self._values and func is _DEVICE:
            return torch.device("cpu")
        used = [entry for tensor in _tensors(args, kwargs) if (entry := self._known.get(id(tensor))) is not None]
        if not used:
            return self._call(func, args, kwargs)
        names = frozenset[str]().union(*(names for _, names in used))
        if func is F.linear:
            self._count(names, args, kwargs)
        made = self._with_less(func, args, kwargs, [tensor for tensor, _ in used if _is_quantized(tensor)])
        for tensor in _tensors((made,), {}):
            if _is_quantized(tensor):
                self._known[id(tensor)] = (tensor, names)
        return made

    def _with_less(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        quantized: Sequence[torch.Tensor],
    ) -> Any:
        """The call with plain tensors in the place of those that it cannot take, and a note of these."""
        try:
            return self._call(func, args, kwargs)
        except Exception:  # an operation that a tensor class lacks may end in anything
            if not quantized:
                raise
            alone = [
                tensor for tensor in quantized if len(quantized) == 1 or not self._takes(func, args, kwargs, tensor)
            ]
            faulty = alone or quantized
            if func is not F.linear or self._is_usual(args, kwargs):
                self._note(faulty, func, kwargs)
            ids = {id(tensor) for tensor in faulty}
            rest = [tensor for tensor in quantized if id(tensor) not in ids]
            return self._with_less(func, _plain(args, ids), _plain(kwargs, ids), rest)

    def _takes(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], tensor: torch.Tensor
    ) -> bool:
        """Whether the call runs with this one quantized and all others plain."""
        others = {id(other) for other in _tensors(args, kwargs) if _is_quantized(other) and other is not tensor}
        try:
            self._call(func, _plain(args, others), _plain(kwargs, others))
        except Exception:
            return False
        return True

    def _count(self, names: frozenset[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else kwargs["input"]
        rows = given.numel() // max(given.shape[-1], 1)
        for name in names:
            self.rows[name] = max(self.rows.get(name, 0), rows)

    def _note(self, faulty: Sequence[torch.Tensor], func: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        classes = sorted({type(tensor).__name__ for tensor in faulty})
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        name = name.removesuffix(".__get__").removeprefix("torch.").removeprefix("nn.").removeprefix("functional.")
        if func is F.linear and "weight" in kwargs:  # torchao's tensors know its arguments by their places
            name = "linear with named arguments"
        text = f"{_caller()} passes it to {name}, which an {' or '.join(classes)} does not support"
        for tensor in faulty:
            self.faults |= {key: text for key in self._known[id(tensor)][1] if key not in self.faults}

    def _is_usual(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the class can be multiplied here at all, on ``meta``: some have kernels for a GPU alone.

        With an input of another dtype no weight can; on ``meta`` a plain one does not say so.
        """
        given = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if given.dtype != weight.dtype:
            return False
        key = (type(weight), weight.shape, weight.dtype)
        if key not in self._usual:
            try:
                F.linear(torch.empty(32, weight.shape[-1], dtype=weight.dtype, device="meta"), weight)
            except Exception:
                self._usual[key] = False
            else:
                self._usual[key] = True
        return self._usual[key]

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not self._values:
            return func(*args, **kwargs)
        tensors = list(_tensors(args, kwargs))
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if all(tensor.is_meta for tensor in tensors):
            try:
                return func(*args, **kwargs)
            except (NotImplementedError, RuntimeError):  # it wants values
                if any(_is_quantized(tensor) or tensor.numel() > _MOST for tensor in tensors):
                    raise
            return func(*_move(args, "cpu"), **_move(kwargs, "cpu"))
        made = func(*_move(args, "meta"), **_move(kwargs, "meta"))
        return _move(made, "cpu")


def _is_quantized(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments, and in the lists there."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, tuple):  # a named one, as torch.max gives
        return type(value)(*(_map(item, change) for item in value)) if hasattr(value, "_fields") else value
    return value


def _plain(value: Any, ids: Set[int]) -> Any:
    """With a plain tensor on ``meta`` for each with one of these ids."""
    return _map(value, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta") if id(t) in ids else t)


def _move(value: Any, device: str) -> Any:
    """With every tensor on that device; what has no values yet gets zeros."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta and device == "cpu":
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return tensor if tensor.is_meta else tensor.to(device)

    return _map(value, move)


def _caller() -> str:
    """The class of the module of the model whose code runs."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Module) and not type(owner).__module__.startswith("torch."):
            return type(owner).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return "its model"
