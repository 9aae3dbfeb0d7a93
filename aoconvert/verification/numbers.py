"""Are the numbers those of the source? Weight by weight, against the error that the manifest states."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from aoconvert.api import make_options
from aoconvert.engine.quantize import Error
from aoconvert.engine.reading import ComponentReading
from aoconvert.environment import import_torchao
from aoconvert.errors import SourceError
from aoconvert.planning.make import make
from aoconvert.sources import resolve
from aoconvert.verification.target import Part, Target

_TOLERANCE_DB = 0.05


def compare_with_source(target: Target, source: str) -> tuple[float, int, list[str]]:
    """Dequantize every weight and compare it with the source's; the rest must be the source's, cast.

    Returns:
        The worst SQNR in dB, the number of tensors compared, and what differs.

    Raises:
        SourceError: there is no manifest, or the source is another model.
    """
    if target.manifest is None:
        raise SourceError("without a manifest there is no error to compare the source with")
    import_torchao()
    worst, count, problems = math.inf, 0, []
    for part, entry in zip(target.parts, target.manifest.components, strict=True):
        with tempfile.TemporaryDirectory() as scratch:
            options: dict[str, Any] = {"output": Path(scratch) / "out", "dtype": entry.dtype, "min_quantized": 0.0}
            if part.name:
                options["components"] = {part.name: None}
            plan = make(resolve(source), make_options(entry.scheme, {**options, "device": "cpu"}), need_weights=True)
            plan.source.fetch(plan.fetch)
            [component] = plan.components
            state = load_state(target, part)
            with ComponentReading(component, plan, Path(scratch)) as reading:
                for tensor in component.tensors:
                    if tensor.action == "tied" or tensor.name not in state:
                        continue
                    sqnr, problem = _compare(tensor.name, reading.read(tensor, None, None), state[tensor.name], part)
                    count += 1
                    worst = min(worst, sqnr)
                    problems += [problem] if problem else []
    return worst, count, problems


def load_state(target: Target, part: Part) -> dict[str, torch.Tensor]:
    """A part's state dict, mapped, with ``weights_only=True``.

    Its pickles were found safe before, and the load check has shown that the manifest's names are enough; here torch
    also knows what ``import torchao`` registered.
    """
    state: dict[str, torch.Tensor] = {}
    for file in part.files:
        state |= torch.load(target.folder / file, weights_only=True, mmap=True)
    return state


def _compare(name: str, original: torch.Tensor, written: torch.Tensor, part: Part) -> tuple[float, str | None]:
    entry = (part.tensors or {})[name]
    if entry.action != "quantize":
        same = torch.equal(original.to(written.dtype), written)
        return math.inf, None if same else f"{name} is not the source's tensor"
    error = Error()
    error.add(original, written)
    sqnr = error.sqnr_db if error.sqnr_db is not None else math.inf
    stated = entry.sqnr_db if entry.sqnr_db is not None else math.inf
    if sqnr != stated and not abs(sqnr - stated) <= _TOLERANCE_DB:
        return sqnr, f"{name} has an SQNR of {sqnr:.2f} dB to the source, the manifest says {stated:.2f}"
    return sqnr, None
