"""One tiny model, quantized to int4 for each device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))

from checkpoints import build_llama, pipeline

import aoconvert

__all__ = ["pipeline"]

Quantized = Callable[..., Path]


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantize the model to int4 for a device; the same options give the same folder, which is never written to."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("int4")

    def quantize(device: str, *, shape: dict[str, Any] | None = None, **options: Any) -> Path:
        model = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 64, **(shape or {})}
        source = root / str(hash(str(model)))
        if not source.exists():
            source.mkdir()
            build_llama(source, **model)
        key = f"{device} {model} {options}"
        if key not in made:
            output = root / str(len(made))
            values = {"group_size": 64, "min_quantized": 0.0, "device": "cpu", **options}
            aoconvert.quantize(source, "int4wo", layout_device=device, output=output, **values)
            made[key] = output
        return made[key]

    return quantize
