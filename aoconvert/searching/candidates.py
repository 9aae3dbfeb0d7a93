"""The schemes that ``auto`` chooses among."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aoconvert import schemes
from aoconvert.errors import PlanError, UsageError
from aoconvert.schemes.layouts import merge

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

DEFAULT = ("int4wo", "int8wo", "float8wo")
"""They are smaller than bfloat16 where they are stored, and need no activations to be quantized."""


def resolve(names: Sequence[str], layout_device: str) -> tuple[Scheme, ...]:
    """The candidates, the fewest bytes a parameter first.

    Args:
        names: what the user gave; none: those of the default that can be made here.
        layout_device: device type that packed weights are for.

    Raises:
        UsageError: no such scheme, or two that are made for different devices.
        PlanError: a scheme that was asked for cannot be made with what is installed.
    """
    found: dict[str, Scheme] = {}
    for name in names or DEFAULT:
        try:
            scheme = schemes.get(name, layout_device=layout_device)
        except PlanError:
            if names:
                raise
            continue
        found.setdefault(scheme.key, scheme)
    try:
        merge([scheme.layout for scheme in found.values()])
    except PlanError as error:
        raise UsageError(
            f"--candidates {','.join(names)}: {error.message}",
            hint="all candidates must be for the same device, which --layout-device names",
        ) from error
    return tuple(sorted(found.values(), key=lambda scheme: scheme.format.bytes_per_parameter))
