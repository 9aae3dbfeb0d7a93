"""What a config may ask for, by what the weights files hold: checked before and while a library makes a model of it.

A config of a few bytes can ask for a billion layers. A library believes it, and takes the machine's time and memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoconvert.errors import SourceError
from aoconvert.memory import available_bytes

_LAYERS = re.compile(
    r"(?:.*_)?(?:n|num)_(?:.*_)?(?:layers?|blocks?|stages?)|(?:.*_)?(?:depths?|layers_per_block|n_layers?)"
)
_SIZES = re.compile(
    r".*(?:_size|_dim|_dims|_channels|_heads|_width|_features|_embeddings|_frames|_rank)|.*experts.*|.*hidden.*"
    r"|d_model|d_ff|d_kv|dim|channels|n_embd|n_head|n_inner"
)
_MANY_LAYERS = 1000  # no model has that many of anything
_LARGE = 1 << 31
_FREE_PARTS = 10_000
_PARTS_PER_TENSOR = 64  # modules and parameters of all the models that are made, for each tensor in the files
_MOST_PARTS = 1_000_000
_BITS = 8  # elements that a byte can hold, at one bit each
_MEMORY = 8 << 30


@dataclass(frozen=True)
class Held:
    """What weights files hold: ``tensors``, and ``elements`` of them at most."""

    tensors: int
    elements: int

    @classmethod
    def of(cls, sizes: Iterable[int]) -> Held:
        """Of tensors of these bytes."""
        sizes = tuple(sizes)
        return cls(len(sizes), sum(sizes) * _BITS)


def check_config(title: str, config: Mapping[str, Any], held: Held | None) -> None:
    """Refuse a config that asks for far more than there is. At any depth: a composed model has configs within.

    Args:
        title: what messages call the model.
        config: as it is in its file.
        held: by the weights files; ``None`` where they are not there, and only what no model has is refused.

    Raises:
        SourceError: with the key, its value and what there is.
    """
    layers = max(_MANY_LAYERS, held.tensors if held is not None else 0)
    largest = max(_LARGE, held.elements if held is not None else 0)
    for path, key, value in _numbers(config, ""):
        most = layers if _LAYERS.fullmatch(key) else largest if _SIZES.fullmatch(key) else None
        if most is not None and value > most:
            there = f"its weights files hold {held.tensors:,} tensors" if held is not None else "no model has that many"
            raise SourceError(
                f"{title}: its config asks for {path} = {value:.4g}, and {there}",
                hint="download config.json again, from the same revision as the weights",
            )


def _numbers(value: Any, path: str) -> Iterator[tuple[str, str, float]]:
    """Each number with its path and key; of a list, the key is the list's."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, path.rpartition(".")[2], value


@contextmanager
def limit_model(title: str, held: Held | None) -> Iterator[None]:
    """Within, a model may have so many modules and parameters, and take so much memory, as ``held`` calls for.

    Raises:
        SourceError: it has more.
    """
    from torch.nn.modules.module import (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    most = _FREE_PARTS + _PARTS_PER_TENSOR * held.tensors if held is not None else _MOST_PARTS
    count = 0

    def count_part(module: object, name: str, part: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            there = f"its weights files hold {held.tensors:,} tensors" if held is not None else "no model has that many"
            raise SourceError(
                f"{title}: its config asks for more than {most:,} modules and parameters, and {there}",
                hint="download config.json again, from the same revision as the weights",
            )

    hooks = [
        register_module_module_registration_hook(count_part),
        register_module_parameter_registration_hook(count_part),
    ]
    try:
        with _memory_limit():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Private memory beyond what there is now is refused by the kernel (``RLIMIT_DATA``; Linux since 4.7)."""
    used = _private_bytes()
    if used is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [
        limit
        for limit in (used + min(_MEMORY, available_bytes()), before[0], before[1])
        if limit != resource.RLIM_INFINITY
    ]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _private_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return None
