"""Conversions to int4 for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aoconvert


def quantize_for(device: str, model: Path, output: Path, **options: Any) -> None:
    """To int4 in groups of 64, unless the options say otherwise."""
    values = {"group_size": 64, "min_quantized": 0.0, "device": "cpu", **options}
    aoconvert.quantize(model, "int4wo", layout_device=device, output=output, **values)
