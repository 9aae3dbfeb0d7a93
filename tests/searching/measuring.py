"""What schemes do to the weights of a checkpoint, by torchao and plain arithmetic, without anything of the search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

import aoconvert
from aoconvert import schemes
from aoconvert.schemes.apply import quantize_weight
from aoconvert.schemes.tensors import dequantize

DEFAULT = ("int4wo", "int8wo", "float8wo")


class Weights:
    """A checkpoint in one safetensors file, its tensors by their names in the model."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder
        found = load_file(next(folder.glob("*.safetensors")))
        self.tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        self._noise: dict[tuple[str, str], float] = {}

    def noise(self, name: str, scheme: str) -> float:
        """Σ(w − dequantized)² in float64."""
        if (name, scheme) not in self._noise:
            weight = self.tensors[name]
            quantized = quantize_weight(weight.to(torch.bfloat16), schemes.get(scheme, layout_device="cpu"))
            wrong = weight.double() - dequantize(quantized).double()
            self._noise[name, scheme] = float(wrong.square().sum())
        return self._noise[name, scheme]

    def sqnr(self, name: str, scheme: str) -> float:
        """In dB."""
        signal = float(self.tensors[name].double().square().sum())
        return 10 * math.log10(signal / self.noise(name, scheme))

    def total(self, plan: aoconvert.Plan) -> float:
        """The squared error of all that a plan quantizes."""
        return sum(self.noise(name, scheme) for name, scheme in choice(plan).items() if scheme is not None)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """What ``int8wo`` quantizes."""
        plan = aoconvert.plan(self.folder, "int8wo", device="cpu")
        return frozenset(name for name, scheme in choice(plan).items() if scheme is not None)

    @cached_property
    def singles(self) -> Mapping[str, tuple[int, float]]:
        """Scheme → bytes of the weights files and squared error, where it is applied to all that can take it."""
        plans = {name: aoconvert.plan(self.folder, name, device="cpu", min_quantized=0.0) for name in DEFAULT}
        return {name: (size_of(plan), self.total(plan)) for name, plan in plans.items()}


def choice(plan: aoconvert.Plan) -> dict[str, str | None]:
    """Matrix → the scheme's name."""
    return {t.name: t.scheme.name if t.scheme is not None else None for t in plan.components[0].tensors if t.candidate}


def size_of(plan: aoconvert.Plan) -> int:
    """Bytes of all weights files."""
    return sum(file.size for part in plan.components for file in part.files)


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.bin"))
