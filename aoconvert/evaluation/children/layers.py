"""The output error of single layers: what a linear layer gives with its own weight, and with the quantized one.

A stack of experts counts as one layer: each row is multiplied by the expert that the original routes it to.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from aoconvert.evaluation.children.experts import Listener, choose_rows, listen
from aoconvert.evaluation.figures import relative_error
from aoconvert.schemes.tensors import dequantize

_AT_ONCE = 1 << 24  # elements of a weight that are widened to float32 at once


@dataclass
class Captured:
    """Rows of what layers are given: layers that share their input have the same number in ``places``.

    ``experts``: number of the rows → which expert each is for. ``transposed``: stacks whose matrices are (in, out).
    """

    rows: list[torch.Tensor] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    experts: dict[int, torch.Tensor] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What is to be kept: the rows, and what the layers make of them, by the names in ``references``."""
        found = {f"inputs.{number}": rows for number, rows in enumerate(self.rows)}
        found |= {f"experts.{number}": experts for number, experts in self.experts.items()}
        for name, number in self.places.items():
            rows = self.rows[number]
            if number in self.experts:
                stack = model.get_parameter(name)
                found[f"outputs.{name}"] = multiply_experts(
                    rows, self.experts[number], stack.__getitem__, name in self.transposed
                )
            else:
                weight = model.get_submodule(name).weight
                assert isinstance(weight, torch.Tensor)
                found[f"outputs.{name}"] = multiply(rows, weight)
        return found

    def metadata(self) -> dict[str, str]:
        """What says which rows are whose."""
        return {"inputs": json.dumps(self.places), "transposed": json.dumps(sorted(self.transposed))}


@contextlib.contextmanager
def capture_inputs(model: nn.Module, most: int) -> Iterator[Captured]:
    """Note up to ``most`` rows of the input of each linear layer, evenly spaced; of several calls the first.

    Of a stack of experts: of the rows of each expert, but at least one.

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

    def note_experts(owner: str, heard: Listener) -> None:
        for own, of_experts in heard.found.items():
            name = f"{owner}.{own}" if owner else own
            rows, experts = choose_rows(of_experts, most)
            found.rows.append(rows)
            found.places[name] = len(found.rows) - 1
            found.experts[found.places[name]] = experts
            found.transposed |= {name} & {f"{owner}.{transposed}" for transposed in heard.transposed}

    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: note(name, given))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.is_meta and module.weight.dim() == 2
    ]
    handles += listen(model, note_experts)
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


def multiply_experts(
    rows: torch.Tensor, experts: torch.Tensor, matrix: Callable[[int], torch.Tensor], transposed: bool
) -> torch.Tensor:
    """X·Wᵀ of each row with the matrix of its expert, as :func:`multiply` gives it.

    Args:
        rows: (rows, in).
        experts: (rows,), which expert each row is for.
        matrix: gives the weight of an expert, (out, in).
        transposed: it is (in, out).
    """
    found: torch.Tensor | None = None
    for expert in sorted(set(experts.tolist())):
        mine = experts == expert
        weight = matrix(expert)
        part = multiply(rows[mine], weight.T if transposed else weight)
        if found is None:
            found = torch.empty(len(rows), part.shape[1])
        found[mine] = part
    assert found is not None
    return found


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
        opened = [_Rows(stack.enter_context(safe_open(str(path), framework="pt"))) for path in files]
        modules = dict(model.named_modules())
        for tensor, layout in packing.items():
            name = tensor.removesuffix(".weight")
            weight = _find_weight(modules, tensor)
            mine = [rows for rows in opened if name in rows.places]
            if weight is None:
                yield {"name": name, "reason": "it is not the weight of a linear layer of its own"}
            elif not mine:
                also = ", or it multiplies its experts in an unknown way" if weight.dim() == 3 else ""
                yield {"name": name, "reason": f"it was not run on these inputs{also}"}
            else:
                yield _measure(name, weight, layout, mine)


def _find_weight(modules: Mapping[str, nn.Module], tensor: str) -> Any:
    """The weight of a linear layer, or a stack of experts; ``None`` for any other tensor."""
    owner, _, own = tensor.rpartition(".")
    module = modules.get(owner)
    weight: Any = module._parameters.get(own) if module is not None else None
    if isinstance(module, nn.Linear):
        return weight if own == "weight" else None
    return weight if weight is not None and weight.dim() == 3 else None


class _Rows:
    """A file of what the original gave."""

    def __init__(self, file: Any) -> None:
        self._file = file
        found = file.metadata() or {}
        self.places: dict[str, int] = json.loads(found.get("inputs", "{}"))
        self._transposed: list[str] = json.loads(found.get("transposed", "[]"))

    def before(self, name: str) -> torch.Tensor:
        """What the layer made of its rows."""
        found: torch.Tensor = self._file.get_tensor(f"outputs.{name}")
        return found

    def after(self, name: str, matrix: Callable[[int | None], torch.Tensor]) -> torch.Tensor:
        """What other weights make of them; ``matrix`` gives the weight of an expert, or of the layer."""
        rows = self._file.get_tensor(f"inputs.{self.places[name]}")
        if f"experts.{self.places[name]}" not in self._file.keys():  # noqa: SIM118
            return multiply(rows, matrix(None))
        experts = self._file.get_tensor(f"experts.{self.places[name]}")
        return multiply_experts(rows, experts, matrix, name in self._transposed)


def _measure(name: str, weight: Any, layout: str | None, files: Sequence[_Rows]) -> dict[str, Any]:
    def matrix(expert: int | None) -> torch.Tensor:
        return dequantize(weight if expert is None else weight[expert], layout).cpu()

    if weight.dim() == 2:
        matrix = lru_cache(maxsize=1)(matrix)
    signal = noise = 0.0
    try:
        for file in files:
            before, after = file.before(name).to(torch.float64), file.after(name, matrix).to(torch.float64)
            signal += float(before.square().sum())
            noise += float((before - after).square().sum())
    except Exception as error:  # torchao's kernels for other devices
        lines = str(error).strip().splitlines() or [""]
        return {"name": name, "reason": f"its values cannot be had here: {type(error).__name__}: {lines[0]}"}
    return {"name": name, "output_sqnr_db": relative_error(signal, noise).get("output_sqnr_db")}
