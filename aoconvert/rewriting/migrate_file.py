"""One weights file without a config: a state dict of today's classes, of which nothing says which model it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aoconvert import schemes
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.manifest import ComponentEntry, DeviationEntry, FileEntry, Manifest, TensorEntry
from aoconvert.engine.manifest_entries import (
    RunClock,
    environment_entry,
    file_entry,
    layout_entry,
    loading_values,
    run_entry,
    tool_entry,
    written_values,
)
from aoconvert.engine.memory import steady_allocator
from aoconvert.engine.staging import staged_output
from aoconvert.errors import PlanError
from aoconvert.formats.base import SealedFile
from aoconvert.formats.registry import TORCH_BIN
from aoconvert.options.migrate import MigrateOptions
from aoconvert.planning.output import output_problems, space_problems
from aoconvert.planning.types import config_dict
from aoconvert.progress import Progress
from aoconvert.recipes import fqn_to_config
from aoconvert.recipes.rules import Rules
from aoconvert.rewriting.migrate_plan import Moved, make_output, scheme_of_old
from aoconvert.rewriting.migrate_types import OldTensor, OldWeights, stored_bytes
from aoconvert.rewriting.migrate_write import describe_weights, find_deviation, make_tensor
from aoconvert.schemes import Scheme
from aoconvert.schemes.layouts import UNPACKED, merge
from aoconvert.sources import Source

STATE_DICT = "state_dict"


def migrate_file(
    source: Source, path: str, weights: OldWeights, options: MigrateOptions, progress: Progress, *, command: str
) -> Manifest:
    """Write one file's tensors again; arguments and errors as of ``migrate``.

    Args:
        source: the folder that holds the file.
        path: of the file in it.
        weights: of the file, open.
        options, progress, command: as of ``migrate``.
    """
    steady_allocator()
    clock = RunClock()
    then = schemes.get(options.then) if options.then is not None else None
    target = f"{Path(path).stem}{TORCH_BIN.suffix}"
    moved = {tensor.name: _move(tensor, then) for tensor in weights.tensors}
    _refuse(source, path, weights, moved, options)
    tensors: list[TensorEntry] = []
    deviations: list[DeviationEntry] = []
    with staged_output(options.output) as stage:
        stage.clear()
        stage.announce([target])
        weights.hash()
        progress.start("migrate", sum(tensor.bytes_in for tensor in weights.tensors))
        sealed = _write(stage.root / target, target, weights, moved, tensors, deviations, progress)
        progress.finish()
        digests = weights.digests()
        loading = loading_values([sealed], torchao=any(item is not None and item.scheme for item in moved.values()))
        entry = _component(weights, moved, tensors, file_entry(target, sealed), loading)
        entry = entry.model_copy(update={"migrated": describe_weights(weights, deviations)})
        written_manifest = Manifest(
            schema_version=1,
            tool=tool_entry(),
            source=manifests.SourceEntry(
                kind="file",
                files=[
                    FileEntry(path=name, size=source.files()[name].size, sha256=digest)
                    for name, digest in digests.items()
                ],
            ),
            environment=environment_entry("cpu"),
            components=[entry],
            copied=[],
            run=run_entry(clock, command),
        )
        stage.publish(manifests.encode(written_manifest))
    return written_manifest


def _write(
    place: Path,
    target: str,
    weights: OldWeights,
    moved: dict[str, Moved | None],
    tensors: list[TensorEntry],
    deviations: list[DeviationEntry],
    progress: Progress,
) -> SealedFile:
    """Write the file, one tensor at a time; what is to be said of each is added to the lists."""
    first: dict[tuple[object, ...], TensorEntry] = {}
    also: dict[str, str] = {}
    with TORCH_BIN.writer(place) as writer:
        for old in weights.tensors:
            same = first.get(old.place) if old.place is not None and old.bytes_in else None
            if same is not None:
                also[old.name] = same.name
                tensors.append(_named(same, old.name))
                continue
            made, error, repaired = make_tensor(old, item := moved[old.name])
            written = writer.add(old.name, made)
            tensors.append(_entry(old, moved[old.name], target, written_values(written), error, repaired))
            if item is not None and (found := find_deviation(item, error, repaired)) is not None:
                deviations.append(found)
            if old.place is not None:
                first[old.place] = tensors[-1]
            del made
            progress.advance(old.bytes_in, old.name)
        return writer.seal([tensor.name for tensor in tensors], also)


def _refuse(
    source: Source, path: str, weights: OldWeights, moved: dict[str, Moved | None], options: MigrateOptions
) -> None:
    """Raise what stands in the way, all at once."""
    problems = list(weights.problems)
    if not problems and not any(moved.values()):
        problems.append(f"{path} holds no tensor that torchao quantized")
    elif not problems and weights.is_todays:
        problems.append(f"{path} is in today's tensor classes already: there is nothing to migrate")
    problems += output_problems(source, options.output, overwrite=options.overwrite)
    problems += space_problems(options.output, sum(stored_bytes(make_output(old, moved[old.name], on_meta=True))
                                                   for old in weights.tensors) if not problems else 0)  # fmt: skip
    if problems:
        raise PlanError(problems)


def _move(old: OldTensor, then: Scheme | None) -> Moved | None:
    if not old.was_quantized:
        return None
    if old.scheme is not None:
        return Moved(old, "carried", scheme_of_old(old), old.reason)
    if then is None or schemes.blocker(old.shape, getattr(torch, old.dtype), then) is not None:
        return Moved(old, "dequantized", None, old.reason)
    return Moved(old, "requantized", then, old.reason)


def _entry(
    old: OldTensor, moved: Moved | None, file: str, written: dict[str, Any], error: float | None, repaired: int
) -> TensorEntry:
    quantized = moved is not None and moved.scheme is not None
    return TensorEntry(
        name=old.name,
        shape=old.shape,
        dtype=old.dtype,
        action="quantize" if quantized else "keep",
        reason=None if quantized else moved.reason if moved is not None else "not quantized in the old checkpoint",
        scheme=moved.scheme.name if moved is not None and moved.scheme is not None else None,
        kind=None,
        bytes_in=old.bytes_in,
        max_abs_error=error,
        repaired_rows=repaired,
        migration=moved.migration if moved is not None else None,
        file=file,
        **written,
    )


def _named(entry: TensorEntry, name: str) -> TensorEntry:
    return replace(entry, name=name, bytes_in=0, bytes_out=0)


def _component(
    weights: OldWeights,
    moved: dict[str, Moved | None],
    tensors: Sequence[TensorEntry],
    file: FileEntry,
    loading: dict[str, list[str]],
) -> ComponentEntry:
    """The state dict, as a component that nothing opens but ``torch.load``."""
    decided = {name: item.scheme if item is not None else None for name, item in moved.items()}
    used = list({scheme.key: scheme for scheme in decided.values() if scheme is not None}.values())
    rules = Rules((), used[0] if len(used) == 1 else None)
    layout = merge([scheme.layout for scheme in used]) if used else UNPACKED
    unconfirmed = next((tensor.unconfirmed for tensor in weights.tensors if tensor.unconfirmed), None)
    parameters = sum(_numel(tensor) for tensor in tensors)
    quantized = sum(_numel(tensor) for tensor in tensors if tensor.action == "quantize")
    bytes_out = sum(tensor.bytes_out for tensor in tensors)
    oldest = max((scheme.min_torchao for scheme in used), key=_version, default=None)
    return ComponentEntry(
        name="",
        path="",
        library="torch",
        class_name=STATE_DICT,
        scheme="+".join(dict.fromkeys(scheme.name for scheme in used)) or manifests.PLAIN,
        config=config_dict(fqn_to_config(rules, decided, set(decided))) if used else {},
        dtype=next((tensor.dtype for tensor in tensors if tensor.action == "quantize"), "bfloat16"),
        layout=layout_entry(layout, unconfirmed),
        format=TORCH_BIN.name,
        files=[file],
        **loading,  # type: ignore[arg-type]
        load=manifests.LoadEntry(strategy="assign", class_name=STATE_DICT),
        loads_with={**({"torchao": f">={oldest}"} if oldest else {}), "torch": ">=2.6"},
        tensors=list(tensors),
        totals=manifests.Totals(
            tensors=len(tensors),
            parameters=parameters,
            quantized_parameters=quantized,
            quantized_fraction=quantized / parameters if parameters else 0.0,
            bytes_in=sum(tensor.bytes_in for tensor in tensors),
            bytes_out=bytes_out,
            bits_per_weight=8 * bytes_out / parameters if parameters else 0.0,
        ),
    )


def _numel(tensor: TensorEntry) -> int:
    return int(torch.Size(tensor.shape).numel())


def _version(text: str) -> Any:
    from packaging.version import Version

    return Version(text)
