"""A conversion that is stopped after some tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aoconvert
from aoconvert.progress import Silent


class StopAfter(Silent):
    """Ctrl-C after ``count`` tensors; ``then`` first."""

    def __init__(self, count: int, then: Callable[[], object] = lambda: None) -> None:
        self.count, self.then = count, then
        self.stage = ""

    def start(self, stage: str, total_bytes: int) -> None:
        self.stage = stage

    def advance(self, nbytes: int, current: str = "") -> None:
        if self.stage in ("quantize", "copy") and threading.current_thread().name == "aoconvert-writer":
            self.count -= 1
            if self.count == 0:
                self.then()
                raise KeyboardInterrupt


def convert(source: Path, output: Path, progress: Any = None, **options: Any) -> Any:
    options = {"scheme": "int8wo", "min_quantized": 0.0, **options}
    return aoconvert.quantize(source, options.pop("scheme"), output=output, device="cpu", progress=progress, **options)
