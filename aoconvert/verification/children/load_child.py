"""Runs in a fresh interpreter, without aoconvert: the library's reader of every file, and what came out of it.

That is ``torch.load`` of a ``.bin``, and torchao's own code for safetensors.

Reads one JSON request from stdin: ``files`` (absolute paths), ``imports`` (modules), ``safe_globals`` (dotted names, or
null for what the imports register). Writes one JSON line a tensor, then ``{"done": true}``, or ``{"error": ...}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import math
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import torch

_MADV_DONTNEED = 4


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    try:
        for name in request["imports"]:
            importlib.import_module(name)
        allowed: list[Any] = []
        if request["safe_globals"] is not None:
            # only what the manifest lists: what the imports registered must not help
            allowed = [resolve(name) for name in request["safe_globals"]]
            torch.serialization.clear_safe_globals()
        for file in request["files"]:
            known: dict[Any, dict[str, Any]] = {}
            for name, tensor in tensors_of(file, allowed):
                key = name if file.endswith(".safetensors") else place(tensor)
                if key not in known:  # what has many names is read once
                    known[key] = describe(tensor)
                say({"file": file, "name": name, **known[key]})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say({"done": True})


def tensors_of(file: str, allowed: list[Any]) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a file, mapped."""
    if file.endswith(".safetensors"):
        yield from safetensors_of(file)
        return
    with torch.serialization.safe_globals(allowed):
        state = torch.load(file, weights_only=True, mmap=True)
    yield from state.items()


def safetensors_of(file: str) -> Iterator[tuple[str, Any]]:
    """One tensor at a time: torchao's reader of a whole file looks at every key for every tensor."""
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(file, framework="pt") as opened:
        metadata, keys = opened.metadata() or {}, set(opened.keys())
        for name in json.loads(metadata.get("tensor_names", "[]")):
            module, _, last = name.rpartition(".")
            parts = json.loads(metadata[name]).get("_tensor_data_names", ())
            stored = [f"{module}._{last}_{part}" for part in parts]
            if parts and keys.issuperset(stored):
                keys.difference_update(stored)
                described = {name: metadata[name], "tensor_names": json.dumps([name])}
                found, _ = unflatten_tensor_state_dict({key: opened.get_tensor(key) for key in stored}, described)
                yield name, found[name]
        for key in opened.keys():  # noqa: SIM118  # it is not a dict
            if key in keys:
                yield key, opened.get_tensor(key)


def resolve(name: str) -> Any:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def place(tensor: Any) -> tuple[Any, ...]:
    """Class and attributes, and where in memory the elements lie: the same for tensors that share all of them."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return (type(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    names, context = flatten()
    return (type(tensor), str(context), *(place(getattr(tensor, name)) for name in names))


def describe(tensor: Any) -> dict[str, Any]:
    """Class, dtype, shape, content hash and what is wrong with its numbers."""
    kind = type(tensor)
    problems: list[str] = []
    digest = hashlib.sha256()
    names = inspect(tensor, "", digest, problems)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "data_names": names,
        "sha256": digest.hexdigest(),
        "problems": problems,
    }


def inspect(tensor: Any, name: str, digest: Any, problems: list[str]) -> list[str]:
    """Hash a tensor's content, inner tensors in order; returns the names of those."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names = list(flatten()[0])
        for inner in names:
            inspect(getattr(tensor, inner), inner, digest, problems)
            if inner.endswith(("scale", "scale_and_zero")) and bool((scales(tensor, inner) == 0).any()):
                problems.append(f"{inner} is zero")
        return names
    data = tensor.contiguous()
    if data.numel():
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    label = name or "a value"
    if data.dtype.is_floating_point:
        values = data if data.dtype.itemsize > 1 else data.to(torch.bfloat16)
        if not bool(torch.isfinite(values).all()):
            problems.append(f"{label} holds NaN or infinity")
    drop_pages(tensor)
    return []


def scales(tensor: Any, name: str) -> torch.Tensor:
    """Scales of a quantized tensor, without the zeros that fill up the tiles of a swizzled layout."""
    found: torch.Tensor = getattr(tensor, name)
    if name == "scale_and_zero":
        return found[..., 0]
    if name == "scale" and getattr(tensor, "is_swizzled_scales", False):
        from torchao.prototype.mx_formats.utils import from_blocked

        groups = tensor.shape[-1] // tensor.block_size
        found = from_blocked(found.flatten(), math.prod(tensor.shape[:-1]), groups)
    return found if found.dtype.itemsize > 1 else found.to(torch.float32)


def drop_pages(tensor: torch.Tensor) -> None:
    """Give the mapped pages of a tensor back: a check of a large file must not fill the memory with it."""
    if not sys.platform.startswith("linux") or not tensor.numel():
        return
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    if length >= 1 << 20 and not storage.is_shared():
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None, use_errno=True)
            whole = ctypes.c_size_t(length // mmap.PAGESIZE * mmap.PAGESIZE)
            libc.madvise(ctypes.c_void_p(start), whole, _MADV_DONTNEED)


def say(value: dict[str, Any]) -> None:
    """One line of the answer."""
    sys.stdout.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
