"""A component's tensors by pattern and by kind of layer: thousands of names as a few lines."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aoconvert.checkpoint.manifest import ComponentEntry, TensorEntry

_PLAIN = re.compile(r"(\w+): not the weight of a linear layer")

# By name, the first that matches; names of diffusers' and transformers' modules.
_KINDS = (
    ("conditioning", r"norm\w*|ada\w*|modulation|\w*_mod|time\w*|guidance\w*"),
    ("attention", r"attn\d*|\w*attention\w*|self_attn|cross_attn|[qkvo]_proj|to_[qkv]|to_out|qkv|query|key|value"),
    ("feed-forward", r"ff|ffn|ff_\w+|mlp|\w*mlp\w*|feed_?forward|\w*experts?|DenseReluDense|intermediate|fc\d|w[123]"
     r"|gate_proj|up_proj|down_proj|linear\d"),
    ("in and out", r"\w*embed\w*|\w*_in|\w*_out|lm_head|pooler|\w*projection|\w*classifier|text_proj|head"),
)  # fmt: skip
KINDS = (*(kind for kind, _ in _KINDS), "other")
_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Layer:
    """A quantized weight: its place among all of the component, name without ``.weight``, kind, and error in dB.

    ``output``: the error of the layer's outputs in dB, where an evaluation measured it.
    """

    place: int
    name: str
    kind: str
    sqnr: float | None
    tensor: TensorEntry
    output: float | None = None


def kind_of(name: str) -> str:
    """What a layer is for, read off its name."""
    parts = name.split(".")
    for kind, pattern in _KINDS:
        if any(re.fullmatch(pattern, part, re.IGNORECASE) for part in parts):
            # inside a block nothing is the model's input or output: BERT's output.dense, Flux's proj_out
            return "feed-forward" if kind == "in and out" and _BLOCK.search(name) else kind
    return "feed-forward" if _BLOCK.search(name) and parts[-1] == "dense" else "other"


def role(tensor: TensorEntry) -> str:
    """``linear``, ``experts`` or ``embedding``; what a manifest before ``kind`` says nothing of is a linear layer's."""
    return "experts" if len(tensor.shape) == 3 else str(getattr(tensor, "kind", None) or "linear")


def layers(component: ComponentEntry, outputs: Mapping[str, float] | None = None) -> list[Layer]:
    """The quantized weights, in the model's order; ``outputs``: layer → the error of its outputs."""
    found = [tensor for tensor in component.tensors if tensor.action == "quantize"]
    return [
        Layer(place, name, kind_of(name), tensor.sqnr_db, tensor, (outputs or {}).get(name))
        for place, tensor in enumerate(found)
        for name in [tensor.name.removesuffix(".weight")]
    ]


def patterns(names: Iterable[str]) -> dict[str, str]:
    """Name → pattern: a number becomes ``*`` where another name differs in nothing else.

    So block numbers do, and the places in a ``Sequential`` of different layers do not.
    """
    split = {name: name.split(".") for name in names}
    seen: defaultdict[tuple[int, tuple[str, ...]], set[str]] = defaultdict(set)
    for parts in split.values():
        for place, part in enumerate(parts):
            if part.isdecimal():
                seen[place, (*parts[:place], "*", *parts[place + 1 :])].add(part)
    return {
        name: ".".join(
            "*" if part.isdecimal() and len(seen[place, (*parts[:place], "*", *parts[place + 1 :])]) > 1 else part
            for place, part in enumerate(parts)
        )
        for name, parts in split.items()
    }


def count(tensor: TensorEntry) -> int:
    """Its elements."""
    total = 1
    for length in tensor.shape:
        total *= length
    return total


def list_quantized(found: Sequence[Layer]) -> list[dict[str, Any]]:
    """One row for each pattern of names and shape, in the model's order."""
    names = patterns(layer.name for layer in found)
    groups: defaultdict[tuple[str, tuple[int, ...]], list[Layer]] = defaultdict(list)
    for layer in found:
        groups[names[layer.name], tuple(layer.tensor.shape)].append(layer)
    return [
        {
            "pattern": pattern,
            "count": len(members),
            "shape": " × ".join(map(str, shape)),
            "parameters": sum(count(layer.tensor) for layer in members),
            "sqnr": _median(layer.sqnr for layer in members),
        }
        for (pattern, shape), members in groups.items()
    ]


def list_unquantized(tensors: Sequence[TensorEntry]) -> list[dict[str, Any]]:
    """One row for each pattern of modules, stored form and reason, in the model's order."""
    names = patterns(tensor.name for tensor in tensors)
    groups: defaultdict[tuple[str, str, str | None], list[TensorEntry]] = defaultdict(list)
    for tensor in tensors:
        groups[names[tensor.name].rpartition(".")[0], tensor.dtype, tensor.reason].append(tensor)
    return [
        {
            "pattern": pattern,
            "leaves": ", ".join(dict.fromkeys(tensor.name.rpartition(".")[2] for tensor in members)),
            "count": len(members),
            "parameters": _parameters(members),
            "stored": dtype,
            "reason": reason,
        }
        for (pattern, dtype, reason), members in groups.items()
    ]


def group_unquantized(component: ComponentEntry) -> list[dict[str, Any]]:
    """What is not quantized, by reason: a line each, the most parameters first."""
    groups: defaultdict[tuple[str, str], list[TensorEntry]] = defaultdict(list)
    for tensor in component.tensors:
        if tensor.action != "quantize":
            reason = tensor.reason or "kept"
            why = "not the weight of a linear layer" if _PLAIN.fullmatch(reason) else reason
            groups[why, tensor.dtype].append(tensor)
    found = [
        {
            "what": _what(members),
            "count": len(members),
            "parameters": _parameters(members),
            "stored": dtype,
            "reason": reason,
        }
        for (reason, dtype), members in groups.items()
    ]
    return sorted(found, key=lambda group: -group["parameters"])


def kinds(found: Sequence[Layer]) -> list[dict[str, Any]]:
    """The error of each kind of layer."""
    result = []
    for kind in KINDS:
        members = [layer for layer in found if layer.kind == kind]
        values = [layer.sqnr for layer in members if layer.sqnr is not None]
        if members:
            result.append(
                {
                    "kind": kind,
                    "layers": len(members),
                    "parameters": sum(count(layer.tensor) for layer in members),
                    "median": _median(values),
                    "lowest": min(values, default=None),
                }
            )
    return result


def worst(found: Sequence[Layer], most: int = 5) -> list[dict[str, Any]]:
    """The layers with the largest error."""
    measured = sorted((layer.sqnr, layer.place, layer) for layer in found if layer.sqnr is not None)
    return [
        {"name": layer.name, "sqnr": sqnr, "shape": " × ".join(map(str, layer.tensor.shape))}
        for sqnr, _, layer in measured[:most]
    ]


def _parameters(members: Sequence[TensorEntry]) -> int:
    """Elements, those of a tied tensor not counted twice."""
    return sum(count(tensor) for tensor in members if tensor.action != "tied")


def _what(members: Sequence[TensorEntry]) -> str:
    """The module classes, or the names' patterns, the largest first; three of them."""
    sizes: defaultdict[str, int] = defaultdict(int)
    names = patterns(tensor.name for tensor in members)
    for tensor in members:
        found = _PLAIN.fullmatch(tensor.reason or "")
        module = None if found is None else "biases" if tensor.name.endswith("bias") else found[1]
        sizes[module or names[tensor.name].removesuffix(".weight")] += count(tensor)
    listed = sorted(sizes, key=lambda name: (-sizes[name], name))
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
