"""Where a checkpoint is opened, and why its weights cannot run there.

Opening, and comparing bytes, works on any device; a kernel for packed weights does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from aoconvert.checkpoint.checkpoint import Checkpoint
from aoconvert.environment import choose_device, device_facts
from aoconvert.errors import PlanError
from aoconvert.formats.registry import read_stored
from aoconvert.inspection.demands import demand_of_entries
from aoconvert.schemes import int4
from aoconvert.schemes.describe import capability
from aoconvert.schemes.tensor_classes import PackedLayout


@dataclass(frozen=True)
class LoadDevice:
    """A device as torch names it, and why the weights cannot run on it (``None``: they can)."""

    device: str
    obstacle: str | None


def choose_load_device(target: Checkpoint, requested: str) -> LoadDevice:
    """Where to open a checkpoint.

    Args:
        target: the checkpoint; without a manifest its files' headers are read, which must have been found safe.
        requested: a device; ``auto`` is the one that the packed weights are for, and the CPU where that is not here.

    Raises:
        PlanError, UsageError: a device that was asked for is not here.
    """
    layouts = list(_layouts(target))
    if requested != "auto":
        device = choose_device(requested)
    else:
        packed = sorted({layout.device for layout in layouts} - {"any", "cpu"})
        device = next((kind for kind in packed if _is_here(kind)), "cpu")
    obstacles = (_obstacle(layout, device) for layout in layouts)
    misfits = (int4.misfit(entry.layout.packing) for entry in target.manifest.components) if target.manifest else ()
    return LoadDevice(device, next((why for why in (*obstacles, *misfits) if why is not None), None))


def _layouts(target: Checkpoint) -> Iterable[PackedLayout]:
    """What the packed weights of each part demand."""
    if target.manifest is not None:
        for entry in target.manifest.components:
            least = entry.layout.min_capability
            yield PackedLayout(entry.layout.device, (least[0], least[1]) if least and len(least) == 2 else None)
        return
    for part in target.parts:
        for file in part.files:
            if (layout := demand_of_entries(read_stored(target.folder / file).tensors.values())) is not None:
                yield layout


def _obstacle(layout: PackedLayout, device: str) -> str | None:
    kind = device.partition(":")[0]
    if layout.device not in ("any", kind):
        why = f"it has to be opened on {kind}" if _is_here(layout.device) else "this device is not available here"
        return f"its layout is for {layout.device}, and {why}"
    if kind != "cuda" or layout.min_capability is None:
        return None
    here = device_facts(device)
    if here.capability is None:
        return f"its layout is for NVIDIA's GPUs, and {here.name} is not one"
    if here.capability < layout.min_capability:
        needed, has = capability(layout.min_capability), capability(here.capability)
        return f"its layout needs CUDA capability {needed}, {here.name} has {has}"
    return None


def _is_here(kind: str) -> bool:
    try:
        choose_device(kind)
    except PlanError:
        return False
    return True
