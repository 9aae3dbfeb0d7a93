"""What a dtype is called. torch is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without ``torch.``, as manifests and plans have it."""
    return str(dtype).removeprefix("torch.")
