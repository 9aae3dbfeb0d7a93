"""What this machine can do with a scheme. Imports no torch: the driver says which GPUs there are."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

from aoconvert.environment import torch_build
from aoconvert.schemes.describe import capability

_SECONDS = 20  # an NVIDIA driver that has to wake its GPUs takes a few


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU: its name and its compute capability."""

    name: str
    capability: tuple[int, int]


def cannot_run(device: str, min_capability: tuple[int, int] | None) -> str | None:
    """Why a layout cannot run here, ``None`` where it can.

    A layout for any device runs on the CPU where there is nothing else; a CUDA device has to be new enough for it.

    Args:
        device: ``any``, or the device that the layout is for.
        min_capability: the lowest CUDA compute capability that it needs.
    """
    if device == "xpu":
        return None if torch_build() == "xpu" else "it needs an XPU, and a torch with XPU support"
    if device == "cpu" or (device == "any" and min_capability is None):
        return None
    found = gpus()
    if not found:
        return "it needs a CUDA device, and torch sees none here" if device == "cuda" else None
    best = max(found, key=lambda gpu: gpu.capability)
    if min_capability is not None and best.capability < min_capability:
        return (
            f"it needs compute capability {capability(min_capability)}, {best.name} has {capability(best.capability)}"
        )
    return None


@cache
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the installed torch can use, by ``nvidia-smi``."""
    program = shutil.which("nvidia-smi")
    if program is None or torch_build() in ("cpu", "xpu"):
        return ()
    command = [program, "--query-gpu=compute_cap,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse(done.stdout) if done.returncode == 0 else ()


def parse(text: str) -> tuple[Gpu, ...]:
    """The lines ``9.0, NVIDIA H100 80GB HBM3``; others are left out."""
    found = []
    for line in text.splitlines():
        number, _, name = (part.strip() for part in line.partition(","))
        major, _, minor = number.partition(".")
        if major.isdecimal() and minor.isdecimal():
            found.append(Gpu(name, (int(major), int(minor))))
    return tuple(found)
