"""What a template shows of one quantized component."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from aoconvert.cards import layers, schemes
from aoconvert.cards.reproduce import ranges
from aoconvert.checkpoint.manifest import ComponentEntry


def describe(entry: ComponentEntry) -> dict[str, Any]:
    """The variables of ``components``, see ``cards.template``."""
    totals = entry.totals
    found = layers.layers(entry)
    used = schemes.list_schemes(entry)
    return {
        "name": entry.name,
        "class_name": entry.class_name,
        "scheme": entry.scheme,
        "config": str(entry.config.get("_type", "")),
        "weights": _and(row["weights"] for row in used),
        "granularity": used[0]["granularity"] if len(used) == 1 else None,
        "dynamic": any(row["dynamic"] for row in used),
        "schemes": used,
        "rules": schemes.rules(entry),
        "what": _what(entry),
        "dtype": entry.dtype,
        "device": entry.layout.device,
        "packing": entry.layout.packing,
        "capability": ".".join(map(str, entry.layout.min_capability or [])) or None,
        "loads_with": [
            {"package": package, "range": span.replace(">=", "≥ ")}
            for package, span in ranges(entry.loads_with).items()
        ],
        "parameters": totals.parameters,
        "quantized_parameters": totals.quantized_parameters,
        "quantized_fraction": totals.quantized_parameters / totals.parameters if totals.parameters else 0.0,
        "layers": len(found),
        "bytes_in": totals.bytes_in,
        "bytes_out": totals.bytes_out,
        "bits_in": 8 * totals.bytes_in / totals.parameters if totals.parameters else 0.0,
        "bits_out": totals.bits_per_weight,
        "quantized": layers.list_quantized(found),
        "kept": layers.list_unquantized([tensor for tensor in entry.tensors if tensor.action != "quantize"]),
        "groups": layers.group_unquantized(entry),
        "kinds": layers.kinds(found),
        "worst": layers.worst(found),
        "migrated": _describe_migrated(entry),
        "converted": (
            {"format": entry.converted.format, "written_by": entry.converted.written_by}
            if entry.converted is not None
            else None
        ),
    }


def _describe_migrated(entry: ComponentEntry) -> dict[str, Any] | None:
    """What a migration did, ``None`` where there was none: counts of tensors, and what differs by reason."""
    if entry.migrated is None:
        return None
    counts = Counter(tensor.migration for tensor in entry.tensors)
    reasons: dict[str, list[float]] = {}
    for item in entry.migrated.deviations:
        reasons.setdefault(item.reason, []).append(item.max_abs_error)
    return {
        "kind": entry.migrated.kind,
        "scheme": entry.migrated.scheme,
        "written_by": entry.migrated.written_by,
        "carried": counts["carried"],
        "dequantized": counts["dequantized"],
        "requantized": counts["requantized"],
        "deviations": [
            {"reason": reason, "count": len(errors), "error": max(errors) or None} for reason, errors in reasons.items()
        ],
    }


def _what(entry: ComponentEntry) -> list[dict[str, Any]]:
    """The quantized weights by what they belong to."""
    names = {"linear": "weights of linear layers", "experts": "stacked experts", "embedding": "embedding tables"}
    found = [tensor for tensor in entry.tensors if tensor.action == "quantize"]
    rows = []
    for kind, what in names.items():
        members = [tensor for tensor in found if layers.role(tensor) == kind]
        if members:
            parameters = sum(layers.count(tensor) for tensor in members)
            weights = _and(
                row["weights"] for row in schemes.list_schemes(entry.model_copy(update={"tensors": members}))
            )
            rows.append({"what": what, "count": len(members), "parameters": parameters, "stored": weights})
    return rows


def _and(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``, each word once."""
    *before, last = dict.fromkeys(words) or ("",)
    return f"{', '.join(before)} and {last}" if before else last
