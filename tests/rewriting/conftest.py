"""One tiny model, quantized to int4 for each device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import build_llama, pipeline
from quantizing import quantize_for

__all__ = ["pipeline"]

SHAPE: Mapping[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 64}
Sources = Callable[..., Path]
Quantized = Callable[..., Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A tiny Llama; the same changes of its shape give the same folder, which is never written to."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def build(**changes: Any) -> Path:
        key = str(changes)
        if key not in made:
            made[key] = root / str(len(made))
            made[key].mkdir()
            build_llama(made[key], **{**SHAPE, **changes})
        return made[key]

    return build


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory, source: Sources) -> Quantized:
    """The model in int4 for a device; the same options give the same folder, which is never written to."""
    root = tmp_path_factory.mktemp("int4")
    made: dict[str, Path] = {}

    def quantize(device: str, *, shape: Mapping[str, Any] | None = None, **options: Any) -> Path:
        key = f"{device} {shape} {options}"
        if key not in made:
            made[key] = root / str(len(made))
            quantize_for(device, source(**(shape or {})), made[key], **options)
        return made[key]

    return quantize
