"""What the tensors of one component were quantized to, and by which rules."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from aoconvert.cards.layers import count
from aoconvert.checkpoint.manifest import ComponentEntry, TensorEntry
from aoconvert.errors import UsageError
from aoconvert.recipes import patterns, scheme_of_config
from aoconvert.schemes.table import INT4, SchemeEntry, catalogue


def list_schemes(entry: ComponentEntry) -> list[dict[str, Any]]:
    """One row for each scheme, the one with the most parameters first; see ``cards.template``."""
    groups: defaultdict[str, list[TensorEntry]] = defaultdict(list)
    for tensor in entry.tensors:
        if tensor.action == "quantize":
            groups[tensor.scheme or entry.scheme].append(tensor)
    scales = _granularities(entry)
    rows = [_row(name, members, entry, scales.get(name)) for name, members in groups.items()]
    return sorted(rows, key=lambda row: -row["parameters"])


def _row(name: str, members: list[TensorEntry], entry: ComponentEntry, granularity: str | None) -> dict[str, Any]:
    parameters = sum(count(tensor) for tensor in members)
    values = [tensor.sqnr_db for tensor in members if tensor.sqnr_db is not None]
    known = _find(name, entry)
    return {
        "name": name,
        "weights": known.weight_dtype if known is not None else name,
        "granularity": granularity,
        "dynamic": known.activation is not None if known is not None else _is_dynamic(entry.config),
        "tensors": len(members),
        "experts": sum(len(tensor.shape) == 3 for tensor in members),
        "parameters": parameters,
        "bytes_per_parameter": sum(tensor.bytes_out for tensor in members) / parameters if parameters else None,
        "median": statistics.median(values) if values else None,
        "lowest": min(values, default=None),
    }


def _is_dynamic(config: Mapping[str, Any]) -> bool:
    return "DynamicActivation" in str(config.get("_type"))


def _group_of_format(config_class: str) -> int | None:
    """How many values share a scale where the format says it, and torchao's config has no field for it."""
    makers = (entry for entry in catalogue() if config_class in (entry.config_class, *entry.aliases))
    return next((entry.tensor_class.group_size for entry in makers), None)


def _find(name: str, entry: ComponentEntry) -> SchemeEntry | None:
    found = next((scheme for scheme in catalogue() if scheme.name == name), None)
    return INT4.get(entry.layout.device, found) if found is not None and found.layout_device is not None else found


def rules(entry: ComponentEntry) -> list[dict[str, str]]:
    """The patterns of an ``FqnToConfig`` and what each means; none where one config is for all linear layers."""
    return [
        {"pattern": pattern, "scheme": "skip" if config is None else _label(pattern, config, entry)}
        for pattern, config in patterns(entry.config)
    ]


def _label(pattern: str, config: Mapping[str, Any], entry: ComponentEntry) -> str:
    """The scheme's name and its group size; torchao's name of the config where no scheme makes it."""
    name = _scheme(pattern, config, entry)
    if name is None:
        return str(config.get("_type"))
    scale = granularity(config)
    return f"{name}, a scale for each {scale}" if scale else name


def _scheme(pattern: str, config: Mapping[str, Any], entry: ComponentEntry) -> str | None:
    """As the manifest says; torchao is asked about those of an older one, which does not."""
    if "+" not in entry.scheme:
        return entry.scheme
    if entry.rules is not None:
        return entry.rules.get(pattern)
    if not isinstance(config.get("_type"), str):
        return None
    try:
        return scheme_of_config(config, entry.layout.device if entry.layout.device != "any" else None).scheme
    except UsageError:
        return None


def _granularities(entry: ComponentEntry) -> dict[str, str]:
    """What shares a scale, by scheme; several are joined."""
    stated = [(pattern, config) for pattern, config in patterns(entry.config) if config is not None]
    found: defaultdict[str, list[str]] = defaultdict(list)
    for pattern, config in stated or [("", entry.config)]:
        name, scale = _scheme(pattern, config, entry), granularity(config)
        if name is not None and scale is not None and scale not in found[name]:
            found[name].append(scale)
    return {name: " or ".join(scales) for name, scales in found.items() if scales}


def granularity(config: Mapping[str, Any]) -> str | None:
    """How many values share a scale, from a torchao config; ``None`` where it does not say."""
    data = config.get("_data")
    if not isinstance(data, Mapping):
        return None
    if (size := _group_of_format(str(config.get("_type")))) is not None:
        return f"{size} values"
    found = data.get("weight_granularity") or data.get("granularity")
    if isinstance(found, list) and found:  # activations, then weights
        found = found[-1]
    if not isinstance(found, Mapping):
        size = data.get("group_size") or data.get("block_size")
        return f"{size} values" if isinstance(size, int) else None
    inner = found.get("_data")
    values: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {}
    if isinstance(group := values.get("group_size"), int):
        return f"{group} values"
    if found.get("_type") == "PerBlock" and isinstance(sides := values.get("block_size"), list):
        return f"block of {' × '.join(map(str, sides))}"
    return {"PerRow": "row", "PerTensor": "tensor", "PerAxis": "row"}.get(str(found.get("_type")))
