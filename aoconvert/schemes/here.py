"""What this machine can do with a scheme."""

from __future__ import annotations

from aoconvert.environment import Device, choose_device, device_facts
from aoconvert.errors import PlanError
from aoconvert.schemes.base import Layout
from aoconvert.schemes.describe import capability


def cannot_run(layout: Layout) -> str | None:
    """Why weights of this layout cannot run here, ``None`` where they can. Imports torch.

    A layout for any device runs on the CPU where there is nothing else; a CUDA device has to be new enough for it.
    """
    if layout.device == "cpu":
        return None
    found = _device("auto" if layout.device == "any" else layout.device)
    if found is None:
        return f"it needs a {layout.device} device, and there is none"
    if found.type == "cuda" and layout.min_capability is not None:
        needed, has = layout.min_capability, found.capability
        if has is not None and has < needed:
            return f"it needs compute capability {capability(needed)}, {found.name} has {capability(has)}"
    return None


def _device(requested: str) -> Device | None:
    try:
        return device_facts(choose_device(requested))
    except PlanError:
        return None
