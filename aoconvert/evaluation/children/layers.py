"""The output error of single layers: what a linear layer gives with its own weight, and with the quantized one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from aoconvert.evaluation.figures import relative_error
from aoconvert.schemes.tensors import dequantize

_AT_ONCE = 1 << 24  # elements of a weight that are widened to float32 at once


@dataclass
class Captured:
    """Rows of what linear layers are given: layers that share their input have the same number in ``places``."""

    rows: list[torch.Tensor] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What is to be kept: the rows, and what the layers make of them, by the names in ``references``."""
        found = {f"inputs.{number}": rows for number, rows in enumerate(self.rows)}
        for name, number in self.places.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            found[f"outputs.{name}"] = multiply(self.rows[number], weight)
        return found

    def metadata(self) -> dict[str, str]:
        """What says which rows are whose."""
        return {"inputs": json.dumps(self.places)}


@contextlib.contextmanager
def capture_inputs(model: nn.Module, most: int) -> Iterator[Captured]:
    """Note up to ``most`` rows of the input of each linear layer, evenly spaced; of several calls the first.

    A layer whose weight is not in memory while no pass runs (offloaded) is left out.
    """
    found = Captured()
    last: list[Any] = [None, -1]

    def note(name: str, given: tuple[Any, ...]) -> None:
        if name in found.places or not given or not isinstance(given[0], torch.Tensor) or not given[0].numel():
            return
        if given[0] is not last[0]:
            rows = given[0].detach().reshape(-1, given[0].shape[-1])
            chosen = torch.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=torch.float64).round().long()
            found.rows.append(rows[chosen.to(rows.device)].cpu().contiguous())
            last[:] = [given[0], len(found.rows) - 1]
        found.places[name] = last[1]

    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: note(name, given))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.is_meta and module.weight.dim() == 2
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """X·Wᵀ in float32 on the CPU, a part of the weight at a time."""
    step = max(1, _AT_ONCE // max(1, weight.shape[1]))
    wide = rows.to(torch.float32)
    with torch.no_grad():
        parts = [wide @ part.detach().cpu().to(torch.float32).T for part in torch.split(weight, step)]
    return torch.cat(parts, dim=1)


def measure_layers(
    model: nn.Module, files: Sequence[Path], packing: Mapping[str, str | None]
) -> Iterator[dict[str, Any]]:
    """The error of each quantized layer on the rows in the files: ``{"name", "output_sqnr_db"}``, or a ``reason``.

    Args:
        model: quantized.
        files: of the samples.
        packing: quantized tensor → the layout that int4 is packed in for a CPU.
    """
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(str(path), framework="pt")) for path in files]
        places = [json.loads((file.metadata() or {}).get("inputs", "{}")) for file in opened]
        modules = dict(model.named_modules())
        for tensor, layout in packing.items():
            name = tensor.removesuffix(".weight")
            module = modules.get(name)
            if not isinstance(module, nn.Linear) or not tensor.endswith(".weight"):
                yield {"name": name, "reason": "it is not the weight of a linear layer of its own"}
            elif not any(name in place for place in places):
                yield {"name": name, "reason": "it was not run on these inputs"}
            else:
                yield _measure(name, module.weight, layout, [*zip(opened, places, strict=True)])


def _measure(name: str, weight: Any, layout: str | None, files: list[tuple[Any, dict[str, int]]]) -> dict[str, Any]:
    try:
        values = dequantize(weight, layout).cpu()
    except Exception as error:  # torchao's kernels for other devices
        lines = str(error).strip().splitlines() or [""]
        return {"name": name, "reason": f"its values cannot be had here: {type(error).__name__}: {lines[0]}"}
    signal = noise = 0.0
    for file, place in files:
        if name in place:
            before = file.get_tensor(f"outputs.{name}").to(torch.float64)
            after = multiply(file.get_tensor(f"inputs.{place[name]}"), values).to(torch.float64)
            signal += float(before.square().sum())
            noise += float((before - after).square().sum())
    return {"name": name, "output_sqnr_db": relative_error(signal, noise).get("output_sqnr_db")}
