"""What a repacking will do, and everything that stands in its way, before anything is written."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.version import Version

from aoconvert import schemes
from aoconvert.checkpoint.manifest import ComponentEntry, Manifest
from aoconvert.environment import import_torchao, quiet_imports
from aoconvert.errors import PlanError, SourceError, UsageError
from aoconvert.formats.registry import TORCH_BIN
from aoconvert.formats.torch_bin.header import read_loadable
from aoconvert.planning.output import output_problems, space_problems
from aoconvert.schemes import int4
from aoconvert.schemes.apply import quantize_weight
from aoconvert.schemes.base import Layout, Scheme
from aoconvert.schemes.imports import imports
from aoconvert.schemes.layouts import merge
from aoconvert.schemes.table import INT4
from aoconvert.schemes.tensor_classes import class_named
from aoconvert.schemes.tensor_classes.current import INT4_OPAQUE
from aoconvert.sources.folder import FolderSource

DEVICES = ("cpu", "cuda", "xpu")
_CONFIG = INT4["cpu"].config_class


@dataclass(frozen=True)
class PartPlan:
    """A component with weights of int4.

    Attributes:
        entry: what the manifest says of it.
        names: of the weights that are packed anew.
        scheme: int4 in the new layout; its group size is that of the first.
        cpu_layout: which of the CPU's layouts they are packed in; ``None`` where it is another device's.
        config: torchao's config of the component, for the new layout.
        layout: what the component is made for then.
    """

    entry: ComponentEntry
    names: frozenset[str]
    scheme: Scheme
    cpu_layout: str | None
    config: dict[str, Any]
    layout: Layout

    @property
    def algorithm(self) -> str:
        """That chose the parameters of the weights."""
        return _algorithm(self.scheme.config)

    @property
    def unconfirmed(self) -> str | None:
        """Why nobody can be sure of the packed bytes yet, of int4 or of another scheme of the component."""
        before = self.entry.layout.unconfirmed
        of_int4 = {entry.unconfirmed for entry in INT4.values()}
        return self.scheme.entry.unconfirmed or (None if before in of_int4 else before)

    @property
    def min_torchao(self) -> str:
        """Oldest torchao that loads the component then; what its other schemes ask for is in the manifest's bound."""
        if only_int4(self.entry, self.names):
            return self.scheme.min_torchao
        before = self.entry.loads_with.get("torchao", "").removeprefix(">=") or "0"
        return max(before, self.scheme.min_torchao, key=Version)


def prepare(folder: Path, manifest: Manifest, device: str, output: Path, *, overwrite: bool) -> Mapping[str, PartPlan]:
    """The components to repack, by name.

    Raises:
        UsageError: no such layout.
        PlanError: with everything that is in the way.
        SourceError, UnsafePickleError: a weights file that is damaged, or must not be loaded.
    """
    if device not in DEVICES:
        raise UsageError(f"the device {device!r} has no layout to repack to", hint=f"use {', '.join(DEVICES)}")
    import_torchao()
    with quiet_imports():
        for name in imports([name for entry in manifest.components for name in entry.safe_globals]):
            importlib.import_module(name)
    if absent := next((file.path for file in manifest.files() if not (folder / file.path).is_file()), None):
        raise SourceError(f"{folder} has no file {absent}", hint="the manifest lists it: download or make it again")
    plans: dict[str, PartPlan] = {}
    problems: list[str] = []
    for entry in manifest.components:
        names = frozenset(t.name for t in entry.tensors if class_named(t.class_name).take_apart is not None)
        if names:
            try:
                problems += _weights_problems(folder, entry, names, device)
                plans[entry.name] = _part(entry, names, device)
            except UsageError as error:
                problems.append(_label(entry, error.message))
    if not plans and not problems:
        raise PlanError([f"{folder} has no int4 weights in groups"], hint="run aoconvert inspect to see what it is")
    if plans and all(plan.entry.layout.packing == plan.layout.packing for plan in plans.values()):
        here = ", as this machine packs it" if device == "cpu" else ""
        problems.append(f"{folder} is already packed for {device}{here}")
    problems += output_problems(FolderSource(folder), output, overwrite=overwrite)
    problems += space_problems(output, sum(map(_bytes, plans.values())))
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    return plans


def rewrite(values: Any, device: str) -> Any:
    """A torchao config as ``config_to_dict`` gives it, with every int4 in it for another device.

    Raises:
        UsageError: a group size or an algorithm that the other layout does not have.
    """
    from torchao.core.config import config_to_dict

    if isinstance(values, list):
        return [rewrite(value, device) for value in values]
    if not isinstance(values, dict):
        return values
    if values.get("_type") != _CONFIG:
        return {key: rewrite(value, device) for key, value in values.items()}
    old = _read(values)
    new: Any = int4.config(old.group_size, device, _algorithm(old))
    return config_to_dict(replace(new, set_inductor_config=old.set_inductor_config))


def _part(entry: ComponentEntry, names: frozenset[str], device: str) -> PartPlan:
    first = _read(next(_int4_configs(entry.config)))
    settings = {"int4_choose_qparams_algorithm": _algorithm(first).upper()}
    scheme = schemes.get("int4wo", group_size=first.group_size, settings=settings, layout_device=device)
    return PartPlan(
        entry,
        names,
        scheme,
        int4.cpu_layout(entry.layout.packing),
        rewrite(entry.config, device),
        _layout(entry, names, scheme.layout),
    )


def only_int4(entry: ComponentEntry, names: frozenset[str]) -> bool:
    """Whether nothing else of the component is quantized."""
    return all(tensor.action != "quantize" or tensor.name in names for tensor in entry.tensors)


def _int4_configs(values: Any) -> Iterator[dict[str, Any]]:
    """Every config of int4 within a config."""
    if isinstance(values, dict) and values.get("_type") == _CONFIG:
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _int4_configs(value)


def _read(values: dict[str, Any]) -> Any:
    """torchao's config; it looks for the class in packages that log while they are imported."""
    from torchao.core.config import config_from_dict

    with quiet_imports():
        return config_from_dict(values)


def _algorithm(config: Any) -> str:
    value = config.int4_choose_qparams_algorithm
    return str(getattr(value, "value", value))


def _layout(entry: ComponentEntry, names: frozenset[str], new: Layout) -> Layout:
    """The new layout of int4, with that of the component's other schemes."""
    if only_int4(entry, names):
        return new
    requires = tuple(text for text in entry.layout.requires if not text.startswith("mslk"))
    layouts = [
        new
        if part in ("tile_packed_to_4d", "plain_int32") or int4.cpu_layout(part)
        else Layout("any", part, None, requires)
        for part in entry.layout.packing.split("+")
    ]
    return merge(layouts if new in layouts else [new, *layouts])  # mslk's layout of int4 is called plain, too


def _weights_problems(folder: Path, entry: ComponentEntry, names: frozenset[str], device: str) -> list[str]:
    """What the layout cannot take, one line a weight."""
    import torch

    if entry.format != TORCH_BIN.name:
        return [_label(entry, f"{entry.format} files cannot be repacked: first aoconvert convert --format bin")]
    problems = []
    layout = int4.cpu_layout(entry.layout.packing)
    if any(t.name in names and class_named(t.class_name) is INT4_OPAQUE for t in entry.tensors) and layout is None:
        problems.append(_label(entry, "its manifest does not say which of the CPU layouts it is packed in"))
    for file in entry.files:
        if not TORCH_BIN.writes(file.path):
            continue
        for name, tensor in read_loadable(folder / file.path).tensors.items():
            if name not in names:
                continue
            block = tensor.attributes.get("block_size")
            size = block[-1] if isinstance(block, tuple) and isinstance(block[-1], int) else 0
            dtype = getattr(torch, tensor.dtype)
            if reason := int4.blocker(tensor.shape, dtype, group_size=size or 1, device=device):
                problems.append(_label(entry, f"{name}: {reason}"))
    return problems


def _bytes(plan: PartPlan) -> int:
    """Bytes of the component's tensors, packed anew."""
    import torch

    total = 0
    for tensor in plan.entry.tensors:
        total += tensor.bytes_out if tensor.name not in plan.names else 0
        if tensor.name in plan.names:
            empty = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
            made: Any = quantize_weight(empty, plan.scheme)
            total += sum(getattr(made, name).nbytes for name in made.__tensor_flatten__()[0])
    return total


def _label(entry: ComponentEntry, text: str) -> str:
    return f"{entry.name}: {text}" if entry.name else text
