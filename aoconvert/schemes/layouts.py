"""Several packed layouts in one checkpoint. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from packaging.requirements import Requirement
from packaging.version import Version

from aoconvert.errors import PlanError
from aoconvert.schemes.base import Layout

UNPACKED = Layout("any", "plain", None, ())
"""Of plain tensors."""


def merge(layouts: Sequence[Layout]) -> Layout:
    """What all of them together demand.

    Raises:
        PlanError: two are made for different devices.
        ValueError: there is none.
    """
    if not layouts:
        raise ValueError("no layouts")
    devices = sorted({layout.device for layout in layouts if layout.device != "any"})
    if len(devices) > 1:
        raise PlanError(
            [f"packed layouts for {' and '.join(devices)} in one model"],
            hint="--layout-device sets the device that int4 is packed for",
        )
    capabilities = [layout.min_capability for layout in layouts if layout.min_capability is not None]
    return Layout(
        devices[0] if devices else "any",
        "+".join(dict.fromkeys(layout.packing for layout in layouts)),
        max(capabilities, default=None),
        _highest([text for layout in layouts for text in layout.requires]),
    )


def _highest(requirements: Sequence[str]) -> tuple[str, ...]:
    """One requirement a package, the one with the highest version."""
    found: dict[str, str] = {}
    for text in requirements:
        name = Requirement(text).name
        if name not in found or _lowest_version(text) > _lowest_version(found[name]):
            found[name] = text
    return tuple(found.values())


def _lowest_version(requirement: str) -> Version:
    return max((Version(bound.version) for bound in Requirement(requirement).specifier), default=Version("0"))
