"""What a template shows of one quantized component."""

from __future__ import annotations

from typing import Any

from aoconvert.cards import layers
from aoconvert.manifest import ComponentEntry
from aoconvert.schemes.table import catalogue


def describe(entry: ComponentEntry) -> dict[str, Any]:
    """The variables of ``components``, see ``cards.template``."""
    totals = entry.totals
    found = layers.layers(entry)
    known = next((scheme for scheme in catalogue() if scheme.name == entry.scheme), None)
    config = str(entry.config.get("_type", ""))
    return {
        "name": entry.name,
        "class_name": entry.class_name,
        "scheme": entry.scheme,
        "config": config,
        "weights": known.weight_dtype if known is not None else entry.scheme,
        "granularity": _granularity(entry.config),
        "dynamic": "DynamicActivation" in config,
        "dtype": entry.dtype,
        "device": entry.layout.device,
        "packing": entry.layout.packing,
        "capability": ".".join(map(str, entry.layout.min_capability or [])) or None,
        "loads_with": [
            {"package": package, "range": span.replace(">=", "≥ ")} for package, span in entry.loads_with.items()
        ],
        "parameters": totals.parameters,
        "quantized_parameters": totals.quantized_parameters,
        "quantized_fraction": totals.quantized_parameters / totals.parameters if totals.parameters else 0.0,
        "layers": len(found),
        "bytes_in": totals.bytes_in,
        "bytes_out": totals.bytes_out,
        "bits_in": 8 * totals.bytes_in / totals.parameters if totals.parameters else 0.0,
        "bits_out": totals.bits_per_weight,
        "quantized": layers.quantized_rows(found),
        "kept": layers.kept_rows([tensor for tensor in entry.tensors if tensor.action != "quantize"]),
        "groups": layers.kept_groups(entry),
        "kinds": layers.kinds(found),
        "worst": layers.worst(found),
    }


def _granularity(config: dict[str, Any]) -> str | None:
    """How many values share a scale, from torchao's config; ``None`` where it does not say."""
    data = config.get("_data")
    if not isinstance(data, dict):
        return None
    found = data.get("weight_granularity") or data.get("granularity")
    if isinstance(found, list) and found:  # activations, then weights
        found = found[-1]
    if not isinstance(found, dict):
        return None
    inner = found.get("_data")
    group = inner.get("group_size") if isinstance(inner, dict) else None
    names = {"PerRow": "row", "PerTensor": "tensor", "PerAxis": "row"}
    return f"{group} values" if isinstance(group, int) else names.get(str(found.get("_type")))
