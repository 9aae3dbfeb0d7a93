"""Memory of a search, measured by the kernel: it does not grow with the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from engine.test_engine_memory import BUILD, run


def peak(layers: int, folder: Path) -> int:
    """Build a CogVideoX transformer of real width and plan it with ``auto``."""
    source = folder / f"source-{layers}"
    run([str(BUILD), "--layers", str(layers), str(source)], folder)
    words = ["-m", "aoconvert", "plan", str(source), "--scheme", "auto", "--target-bits", "7", "--device", "cpu"]
    printed, peak = run([*words, "--json"], folder)
    (part,) = json.loads(printed)["components"]
    assert 6.93 <= part["totals"]["bits_per_weight"] <= 7
    return peak


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
def test_peak_does_not_grow_with_the_model(tmp_path: Path) -> None:
    one, two = peak(5, tmp_path), peak(10, tmp_path)
    assert two < 1.1 * one
    assert two < 1500 * 10**6
