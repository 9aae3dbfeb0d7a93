"""Trying an input: the empty copy of a model, and how far its forward pass gets."""

from __future__ import annotations

import contextlib
import linecache
import math
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_LARGEST_COPY = 1 << 30  # bytes; random numbers for more take minutes
_SHOWN = 12  # frames of a traceback that are looked at, the innermost ones


@dataclass(frozen=True)
class Frame:
    """Where an error passed: the line of code, those around it, and the local names that are ``None`` or tensors."""

    line: str
    around: str
    absent: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Misfit:
    """A layer that did not take its input: the input's size along the axis it looks at, and what it wants there.

    ``axes`` is how many the input should have, 0 where the layer does not mind.
    """

    shape: tuple[int, ...]
    got: int
    want: int
    axes: int


@dataclass(frozen=True)
class Attempt:
    """What came of one forward pass.

    Attributes:
        output: what it gave, where ``error`` is ``None``.
        error: what it raised.
        progress: how many functions of torch were called until then.
        frames: of the error, the innermost first.
        misfit: the layer that raised it, where it was one of torch's.
    """

    output: Any
    error: BaseException | None
    progress: int
    frames: tuple[Frame, ...] = ()
    misfit: Misfit | None = None

    @property
    def where(self) -> tuple[str, str]:
        """What was raised, and in which line: by that two failures are the same."""
        return str(self.error), self.frames[0].line if self.frames else ""


class TookTooLong(Exception):
    """A pass was ended before it was over."""


class TookTooMuch(Exception):
    """A pass was ended before it took too much memory."""


_MOST = 1 << 28  # elements of one tensor in a trial


class _Counter(TorchFunctionMode):
    def __init__(self, until: float) -> None:
        super().__init__()
        self.count, self.until = 0, until

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if time.thread_time() > self.until:
            raise TookTooLong("the forward pass takes too long")
        if _product(func, (*args, *(kwargs or {}).values())[:2]) > _MOST:
            raise TookTooMuch("the forward pass needs too much memory")
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.numel() > _MOST:
            raise TookTooMuch("the forward pass needs too much memory")
        return output


def _product(func: Any, operands: tuple[Any, ...]) -> int:
    """How many elements a product of matrices has, or the scores of an attention: known before they are there."""
    name = getattr(func, "__name__", "")
    attention = name == "scaled_dot_product_attention"
    if not attention and name not in ("matmul", "bmm", "__matmul__"):
        return 0
    if len(operands) < 2 or not all(isinstance(one, torch.Tensor) and one.dim() > 1 for one in operands):
        return 0
    first, second = operands
    return int(math.prod(first.shape[:-1]) * second.shape[-2 if attention else -1])


def attempt(model: nn.Module, inputs: Mapping[str, Any], until: float = math.inf) -> Attempt:
    """One forward pass, its random numbers seeded; it is ended at ``until``, by the thread's clock."""
    counter = _Counter(until)
    outcome = _run(model, inputs, counter, counter)
    if type(outcome.error).__module__ == "torch._dynamo.exc":  # what is compiled on the way cannot be counted
        return _run(model, inputs, counter, contextlib.nullcontext())
    return outcome


def _run(
    model: nn.Module, inputs: Mapping[str, Any], counter: _Counter, watched: contextlib.AbstractContextManager[Any]
) -> Attempt:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            with watched:
                output = model(**inputs)
        except Exception as error:  # whatever a model raises for an input that does not fit
            trace = list(walk_tb(error.__traceback__))
            return Attempt(None, error, counter.count, tuple(_frames(trace)), _misfit(trace))
    return Attempt(output, None, counter.count)


def _frames(trace: list[tuple[FrameType, int]]) -> Iterator[Frame]:
    for frame, number in reversed(trace[-_SHOWN:]):
        path = frame.f_code.co_filename
        if "/torch/" in path or path == __file__:
            continue
        lines = [linecache.getline(path, number + extra).strip() for extra in (0, 1, 2, 3, -1, -2)]
        names = dict(frame.f_locals)
        yield Frame(
            line=lines[0] if lines[0].endswith((")", ":")) else " ".join(lines[:3]),
            around=" ".join(lines),
            absent=frozenset(name for name, value in names.items() if value is None),
            shapes={name: tuple(value.shape) for name, value in names.items() if isinstance(value, torch.Tensor)},
        )


def _misfit(trace: list[tuple[FrameType, int]]) -> Misfit | None:
    for frame, _ in reversed(trace):
        module, given = frame.f_locals.get("self"), frame.f_locals.get("input")
        if not isinstance(module, nn.Module) or not isinstance(given, torch.Tensor):
            continue
        shape = tuple(given.shape)
        if isinstance(module, nn.modules.conv._ConvNd):
            return Misfit(shape, shape[1] if len(shape) > 1 else 0, module.in_channels, module.weight.dim())
        if isinstance(module, nn.Linear):
            return Misfit(shape, shape[-1] if shape else 0, module.in_features, 0)
    return None


def empty_copy(model: nn.Module, device: str = "meta") -> nn.Module | None:
    """The same class from the same config, not quantized: on ``meta`` without weights, or with random ones.

    Returns:
        The model in the dtypes of ``model``, ready for a forward pass; ``None`` where its class cannot be built so.
    """
    cls: Any = type(model)
    dtype, config = base_dtype(model), _config(model)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            copy: nn.Module
            if hasattr(cls, "_from_config"):
                copy = cls._from_config(_plain(config), dtype=dtype)
            else:
                copy = cls.from_config({k: v for k, v in dict(config).items() if k != "quantization_config"})
    except Exception:  # a class may want real numbers to build itself
        return None
    _cast(copy, model, dtype)
    return copy.eval()


def _cast(copy: nn.Module, model: nn.Module, dtype: torch.dtype) -> None:
    """Give each tensor the dtype that it has in ``model``: libraries keep some in float32."""
    wanted = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in (*copy.named_parameters(), *copy.named_buffers()):
        if tensor.dtype.is_floating_point:
            tensor.data = tensor.data.to(wanted.get(name, dtype))


def roomy_copy(model: nn.Module) -> nn.Module | None:
    """The same class with random weights on the CPU, where that takes little memory and time."""
    empty = empty_copy(model)
    parts = model if empty is None else empty
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*parts.parameters(), *parts.buffers()))
    return empty_copy(model, "cpu") if size < min(_LARGEST_COPY, available_memory() // 2) else None


def available_memory() -> int:
    """Bytes that can be had without swapping; plenty where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 1 << 62


def _config(model: Any) -> Any:
    return model.config


def _plain(config: Any) -> Any:
    """The config without what it says of quantization."""
    config = deepcopy(config)
    with contextlib.suppress(AttributeError):
        del config.quantization_config
    return config


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the model's floating-point values are in."""
    counts: dict[torch.dtype, int] = {}
    for tensor in model.parameters():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def is_quantized(model: nn.Module) -> bool:
    """Whether a parameter is a tensor of torchao's classes."""
    return any(hasattr(parameter.data, "__tensor_flatten__") for parameter in model.parameters())


def on_meta(model: nn.Module) -> bool:
    """Whether the model has no weights."""
    return any(parameter.is_meta for parameter in model.parameters())


_OF_META = (
    *("meta tensor", "'aten::", "data-dependent", "on meta", "meta device", "device meta", "device_type 'meta'"),
    # kernels that know fewer dtypes for meta than for the CPU
    *("unsupported scalartype", "expected inputs of bf16 type"),
)


def needs_values(error: BaseException) -> bool:
    """Whether a pass failed for want of values only: what ``meta`` tensors do not have."""
    text = f"{type(error).__name__}: {error}".lower()
    return any(sign in text for sign in _OF_META) or isinstance(error, NotImplementedError)
