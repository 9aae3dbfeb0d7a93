"""Pairs of pictures: PSNR and SSIM by torchmetrics, LPIPS where its weights are on this machine."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
"""What torchvision calls the weights of its AlexNet, which LPIPS is computed with."""


def missing_package() -> str | None:
    """Why pictures cannot be compared here; ``None`` where they can."""
    if importlib.util.find_spec("torchmetrics") is not None:
        return None
    return "pictures are compared by torchmetrics, which is not installed"


def missing_lpips() -> str | None:
    """Why LPIPS cannot be computed here; ``None`` where it can. Nothing is fetched for it."""
    if importlib.util.find_spec("torchvision") is None:
        return "LPIPS needs torchvision, which is not installed"
    place = Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_WEIGHTS
    if not place.is_file():
        return f"LPIPS needs AlexNet's weights, which are not on this machine ({_LPIPS_WEIGHTS} in torch's cache)"
    return None


def compare_pictures(before: torch.Tensor, after: torch.Tensor, *, lpips: bool) -> dict[str, Any]:
    """Compare two 8-bit pictures or videos, frame by frame.

    Args:
        before, after: uint8, (frames, height, width, 3).
        lpips: compute it, too.

    Returns:
        ``frames``: how many; ``psnr``: dB, of those that are not equal; ``ssim``, and ``lpips`` where it is asked for.

    Raises:
        ValueError: they have different shapes.
    """
    if before.shape != after.shape:
        raise ValueError(f"the original's pictures are {list(before.shape)}, the quantized model's {list(after.shape)}")
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr: list[float] = []
    ssim: list[float] = []
    distances: list[float] = []
    for one, other in _frames(before, after):
        found = float(peak_signal_noise_ratio(other, one, data_range=1.0))
        psnr += [found] if math.isfinite(found) else []
        if min(one.shape[-2:]) > 5:  # its window is reflected at the border by 5 pixels
            similar = structural_similarity_index_measure(other, one, data_range=1.0)
            ssim.append(float(similar if isinstance(similar, torch.Tensor) else similar[0]))
        if lpips:
            distances.append(_distance(one, other))
    return {"frames": len(before), "psnr": psnr, "ssim": ssim, **({"lpips": distances} if lpips else {})}


def _frames(before: torch.Tensor, after: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of (1, 3, height, width) in 0 … 1, float64."""
    for pair in zip(before, after, strict=True):
        one, other = (frame.permute(2, 0, 1)[None].to(torch.float64) / 255 for frame in pair)
        yield one, other


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    narrow, exact = other.to(torch.float32), one.to(torch.float32)
    return float(learned_perceptual_image_patch_similarity(narrow, exact, net_type="alex", normalize=True))
