"""Who wrote a checkpoint: from the manifest where there is one, else inferred, and said so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aoconvert.checkpoint.manifest import Manifest
from aoconvert.inspection.compat import find_written, short
from aoconvert.inspection.types import FileFacts

_PACKAGES = ("torchao", "torch", "python", "diffusers", "transformers")


def find_writer(files: Iterable[FileFacts], config: Mapping[str, Any], manifest: Manifest | None) -> dict[str, Any]:
    """Versions of what wrote a component, ``None`` where nothing says it.

    Args:
        files: its weights.
        config: its ``config.json``.
        manifest: ``aoconvert.json`` that lists it.

    Returns:
        ``tool``, a version for each package, ``torchao_range`` (``{"min", "max"}``, both included) and ``how``.
    """
    found: dict[str, Any] = {"tool": None, **dict.fromkeys(_PACKAGES), "torchao_range": None, "how": None}
    if manifest is not None:
        environment = manifest.environment
        found |= {name: getattr(environment, name) for name in _PACKAGES}
        span = {"min": environment.torchao, "max": environment.torchao}
        return found | {
            "tool": f"{manifest.tool.name} {manifest.tool.version}",
            "torchao_range": span,
            "how": "aoconvert.json",
        }
    hows = []
    for package, key in (("diffusers", "_diffusers_version"), ("transformers", "transformers_version")):
        if isinstance(config.get(key), str):
            found[package] = config[key]
            hows.append(f"{package} from config.json")
    files = list(files)
    names = {name for file in files for name in file.globals}
    entries = [tensor.entry for file in files for tensor in file.tensors if tensor.entry is not None]
    span_found = find_written(names, entries)
    if span_found is not None:
        first, last = span_found
        found["torchao_range"] = {"min": short(first), "max": short(last)}
        found["torchao"] = short(first) if first == last else None
        hows.append("torchao inferred from class names, module paths and fields")
    return found | {"how": "; ".join(hows) or None}
