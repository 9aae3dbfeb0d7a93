"""Are the numbers those of the source? Weight by weight, against the error that the manifest states."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aoconvert.checkpoint.checkpoint import Checkpoint, Part
from aoconvert.checkpoint.manifest import ComponentEntry
from aoconvert.checkpoint.opening import allow_globals
from aoconvert.engine.read import ComponentReading
from aoconvert.environment import import_torchao
from aoconvert.errors import SourceError
from aoconvert.formats.registry import open_stored
from aoconvert.options import make_options
from aoconvert.planning import Plan
from aoconvert.planning.build import build_plan
from aoconvert.planning.types import ComponentPlan
from aoconvert.rewriting.compare_old import compare_with_old, open_old
from aoconvert.schemes import int4
from aoconvert.schemes.error_stats import ErrorStats
from aoconvert.schemes.tensors import dequantize
from aoconvert.sources import Source

_TOLERANCE_DB = 0.05


def compare_with_source(
    target: Checkpoint,
    source: Source,
    only: Mapping[str, frozenset[str]] | None = None,
    loras: Sequence[str] = (),
) -> tuple[float, int, list[str]]:
    """Dequantize every weight and compare it with the source's; the rest must be the source's, cast.

    Args:
        target: the checkpoint.
        source: the original.
        only: part → the tensors to compare; ``None``: all.
        loras: that were added, as ``--lora`` takes them.

    Returns:
        The worst SQNR in dB, the number of tensors compared, and what differs.

    Raises:
        SourceError: there is no manifest, or the source is another model.
    """
    if target.manifest is None:
        raise SourceError("without a manifest there is no error to compare the source with")
    import_torchao()
    worst, count, problems = math.inf, 0, []
    for part, entry in zip(target.parts, target.manifest.components, strict=True):
        with allow_globals(target), contextlib.ExitStack() as stack:
            files = [stack.enter_context(open_stored(target.folder / file)) for file in part.files]
            found = {name: file for file in files for name in file.contents.tensors}
            if only is not None:
                found = {name: file for name, file in found.items() if name in only.get(part.name, ())}
            old = open_old(source, entry, target.manifest.run.command) if found else None
            if old is not None:
                for _, problem in compare_with_old(old, entry.tensors, found):
                    count += 1
                    problems += [problem] if problem else []
                continue
            for name, original in _originals(source, part, entry, found, loras) if found else ():
                sqnr, problem = _compare(name, original, found[name].read(name), part, entry.layout.packing)
                count += 1
                worst = min(worst, sqnr)
                problems += [problem] if problem else []
    return worst, count, problems


def _originals(
    source: Source, part: Part, entry: ComponentEntry, state: Container[str], loras: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The source's tensors under the names that the checkpoint has for them."""
    with open_originals(source, part, entry, state, loras) as (component, reading):
        for tensor in component.tensors:
            if tensor.action != "tied" and tensor.name in state:
                yield tensor.name, reading.read(tensor, None, None)


@contextlib.contextmanager
def open_originals(
    source: Source, part: Part, entry: ComponentEntry, names: Container[str], loras: Sequence[str] = ()
) -> Iterator[tuple[ComponentPlan, ComponentReading]]:
    """A plan that has the source's tensors under the names that the checkpoint has for them, and what reads them.

    Args:
        source: the original.
        part, entry: a part of the checkpoint, and what its manifest says of it.
        names: that are asked for: one that is tied in the source is read where it is among them.
        loras: that were added, as ``--lora`` takes them.

    Raises:
        SourceError, PlanError: the source is another model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        plan = _reading_plan(source, Path(scratch), part, entry, loras, untie=False)
        if any(tensor.action == "tied" and tensor.name in names for tensor in plan.components[0].tensors):
            plan = _reading_plan(source, Path(scratch), part, entry, loras, untie=True)
        plan.source.fetch(plan.fetch)
        [component] = plan.components
        with ComponentReading(component, plan, Path(scratch)) as reading:
            yield component, reading


def _reading_plan(
    source: Source, scratch: Path, part: Part, entry: ComponentEntry, loras: Sequence[str], *, untie: bool
) -> Plan:
    """A plan that says where each of the model's tensors comes from; what it would quantize is of no interest."""
    options: dict[str, Any] = {
        "output": scratch / "out",
        "dtype": entry.dtype,
        "device": "cpu",
        "min_quantized": 0.0,
        "include_embeddings": True,
        "default_skips": False,
        "fuse_qkv": part.fused,
        "untie": untie,
        "lora": loras,
        # exact names: a pattern out of a manifest could be anything
        "allow_missing": [item.name for item in entry.missing if not item.name.startswith("re:")],
    }
    if entry.name:
        options["components"] = {entry.name: None}
    return build_plan(source, make_options("int8wo", options), need_weights=True)


def _compare(
    name: str, original: torch.Tensor, written: torch.Tensor, part: Part, packing: str
) -> tuple[float, str | None]:
    entry = (part.tensors or {})[name]
    if entry.action != "quantize":
        same = torch.equal(original.to(written.dtype), written)
        return math.inf, None if same else f"{name} is not the source's tensor"
    error = ErrorStats()
    error.add(original, dequantize(written, int4.cpu_layout(packing)))
    sqnr = error.sqnr_db if error.sqnr_db is not None else math.inf
    if entry.sqnr_db is None and entry.migration is not None:  # the original was not at hand then: there is none
        return sqnr, None
    stated = entry.sqnr_db if entry.sqnr_db is not None else math.inf
    if sqnr != stated and not abs(sqnr - stated) <= _TOLERANCE_DB:
        return sqnr, f"{name} has an SQNR of {sqnr:.2f} dB to the source, but the manifest says {stated:.2f}"
    return sqnr, None
