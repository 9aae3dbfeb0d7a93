"""A tensor's bytes, and what names them whatever file holds them."""

from __future__ import annotations

import hashlib

import torch

from aoconvert.formats.torch_bin.pickle_tree import is_wrapper, own_storage


def data_names(tensor: torch.Tensor) -> tuple[str, ...]:
    """Names of the inner tensors of a wrapper subclass, in ``__tensor_flatten__`` order; empty for a plain tensor."""
    return tuple(tensor.__tensor_flatten__()[0]) if is_wrapper(tensor) else ()  # type: ignore[attr-defined]


def content_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) over the elements in row-major order; of a subclass, over its inner tensors in their order.

    It names the content, whatever file or format holds it.
    """
    digest = hashlib.sha256()
    update(digest, tensor)
    return digest.hexdigest()


def update(digest: hashlib._Hash, tensor: torch.Tensor) -> None:
    """Feed the content of ``tensor`` to ``digest``, as ``content_sha256`` says."""
    if names := data_names(tensor):
        for name in names:
            update(digest, getattr(tensor, name))
    else:
        digest.update(bytes_of(own_storage(tensor).contiguous()))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's storage, not copied."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data


def own_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which may be a part of its storage; not copied."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    return bytes_of(tensor)[start : start + tensor.nbytes]
