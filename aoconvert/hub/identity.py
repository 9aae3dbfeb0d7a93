"""Is a checkpoint the same model as the one that a branch holds?

The same model in another scheme, another version of its source, or with other components quantized is an update, and
that is what whoever pushes again expects. Another source, another class, other shapes are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aoconvert.checkpoint.manifest import ComponentEntry, Manifest
from aoconvert.humanize import with_article

Shapes = Mapping[str, tuple[int, ...]]


def other_model(ours: Manifest, theirs: Manifest) -> str | None:
    """What ``theirs`` is, where that is another model than ``ours``; ``None`` where it is the same.

    Where both name a repo as their source, that decides together with the classes; else names and shapes of the
    tensors do too, so that two models of one architecture are told apart by their sizes.
    """
    mine, other = ours.source.repo_id, theirs.source.repo_id
    if mine is not None and other is not None and mine.lower() != other.lower():
        return f"one made from {other}, and this one is made from {mine}"
    if mine is not None and other is not None and (ours.source.subfolder or "") != (theirs.source.subfolder or ""):
        there, here = (entry.source.subfolder or "the root" for entry in (theirs, ours))
        return f"the model in {there} of {other}, and this one is the model in {here}"
    if _kind(ours, theirs) != _kind(theirs, ours):
        return f"{with_article(_kind(theirs, ours))}, and this is {with_article(_kind(ours, theirs))}"
    before, now = _by_name(theirs), _by_name(ours)
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if old.class_name != new.class_name:
            return f"{with_article(old.class_name)}, and this is {with_article(new.class_name)}"
        if (mine is None or other is None) and (odd := _other_shape(_shapes(old), _shapes(new))):
            return f"another {old.class_name}: {odd}"
    if not before.keys() & now.keys() and (mine is None or other is None):
        return (
            f"one with {_names(before)} quantized, and this one has {_names(now)}: nothing shows that they are the same"
        )
    return None


def other_config(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The same by their configs (``config.json`` or ``model_index.json``), where there is no manifest."""
    mine, other = _class_of(ours), _class_of(theirs)
    return None if mine == other else f"{with_article(str(other))}, and this is {with_article(str(mine))}"


def _class_of(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return str(config.get("_class_name") or first or config.get("model_type") or "model of an unknown class")


def _kind(manifest: Manifest, other: Manifest) -> str:
    """The pipeline's class, where both manifests say it."""
    if manifest.pipeline is not None and other.pipeline is not None:
        return manifest.pipeline.class_name
    return "pipeline" if any(entry.name for entry in manifest.components) else "model"


def _by_name(manifest: Manifest) -> dict[str, ComponentEntry]:
    return {entry.name: entry for entry in manifest.components}


def _names(entries: Mapping[str, ComponentEntry]) -> str:
    return " and ".join(sorted(entries))


def _shapes(entry: ComponentEntry) -> Shapes:
    return {tensor.name: tuple(tensor.shape) for tensor in entry.tensors if str(tensor.action) != "carry"}


def _other_shape(there: Shapes, here: Shapes) -> str | None:
    """The first tensor that differs."""
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            shown = ["none" if shape is None else list(shape) for shape in (there.get(name), here.get(name))]
            return f"its {name} is {shown[0]}, and here {shown[1]}"
    return None


def other_schemes(ours: Manifest, theirs: Manifest) -> str | None:
    """What to say where the same model is replaced by one in another scheme."""
    before, now = ({entry.scheme for entry in manifest.components} for manifest in (theirs, ours))
    return None if before == now else f"{' and '.join(sorted(before))} there before, {' and '.join(sorted(now))} now"
