"""A torchao checkpoint that somebody else wrote, described as a manifest describes one of aoconvert.

Everything is read off its files: classes, shapes and settings off the headers, how it is quantized off ``config.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import DTYPES
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import (
    ComponentEntry,
    ConvertedEntry,
    FileEntry,
    Manifest,
    SourceEntry,
    StoredEntry,
    TensorEntry,
    UnquantizedEntry,
)
from aoconvert.engine.manifest_entries import (
    RunClock,
    environment_entry,
    layout_entry,
    pipeline_entry,
    run_entry,
    tool_entry,
)
from aoconvert.engine.source_card import read_card
from aoconvert.environment import import_torchao
from aoconvert.errors import AoconvertError, SourceError
from aoconvert.formats.base import StoredFile
from aoconvert.formats.content import data_names
from aoconvert.formats.dtypes import dtype_name
from aoconvert.formats.registry import TORCH_BIN, open_stored
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.formats.torch_bin.header import read_bin
from aoconvert.inspection.compat import find_written, short
from aoconvert.inspection.demands import demand_of_entries
from aoconvert.inspection.scheme import scheme_of
from aoconvert.models import ModelLayout, ModelPart, build_skeleton, identify, join
from aoconvert.models.base import TensorSpec
from aoconvert.models.bounds import Held, check_config, limit_model
from aoconvert.options import QuantizeOptions
from aoconvert.planning.copying import sort_files, unread_pickles
from aoconvert.recipes.foreign_configs import check_quantization
from aoconvert.recipes.recorded import from_config, rule_schemes
from aoconvert.schemes import get
from aoconvert.schemes.base import Layout
from aoconvert.schemes.imports import imports
from aoconvert.schemes.layouts import UNPACKED, merge
from aoconvert.sources import find_weights
from aoconvert.sources.folder import FolderSource
from aoconvert.sources.weights import WeightFiles

_NOT_QUANTIZED = "it was not quantized"


@dataclass(frozen=True)
class _Model:
    """One model, its files open."""

    component: ModelPart
    files: WeightFiles
    opened: Mapping[str, StoredFile]

    @property
    def tensors(self) -> Iterator[tuple[str, str, BinTensor]]:
        """File, name and description of each."""
        for path, stored in self.opened.items():
            for name, tensor in stored.contents.tensors.items():
                yield path, name, tensor

    @property
    def is_quantized(self) -> bool:
        """Whether a tensor of it is of a torchao class."""
        return any(tensor.inner for _, _, tensor in self.tensors)


def describe_checkpoint(folder: Path, command: str) -> Manifest:
    """Describe a folder that transformers, diffusers or torchao's own functions wrote, without a digest of a tensor.

    Args:
        folder: with ``config.json`` or ``model_index.json``.
        command: the command line, for the manifest.

    Raises:
        SourceError: no torchao tensors, tensors of classes that are gone, or a config that does not say how they are
            quantized.
        UnsafeFileError: a weights file that must not be loaded.
    """
    import_torchao()
    clock = RunClock()
    source = FolderSource(folder)
    try:
        layout = identify(source)
    except SourceError as error:
        raise SourceError(f"{folder} has no {manifests.MANIFEST_NAME}, and {error.message}", hint=error.hint) from error
    with ExitStack() as stack:
        models = [
            _Model(component, files, {path: stack.enter_context(_open(folder, path)) for path in files.files})
            for component in layout.components
            if (files := find_weights(source, component.folder, component.library, config=component.config))
        ]
        quantized = [model for model in models if model.is_quantized]
        if not quantized:
            raise SourceError(
                f"{folder} has no {manifests.MANIFEST_NAME}, and holds no tensor that torchao quantized",
                hint="aoconvert inspect shows what it is, and the command that takes it",
            )
        components = [_component(folder, model) for model in quantized]
        others = [_unquantized(folder, model) for model in models if not model.is_quantized]
        copied, left_behind = _sort(source, layout, quantized, models)
    read = [path for model in models for path in model.files.files]
    return Manifest(
        schema_version=1,
        tool=tool_entry(),
        source=_source(source, [_file(folder, path) for path in sorted(read)]),
        environment=environment_entry("cpu"),
        pipeline=pipeline_entry(layout),
        components=components,
        unquantized=others,
        copied=copied,
        left_behind=left_behind,
        run=run_entry(clock, command),
    )


def _open(folder: Path, path: str) -> StoredFile:
    """Open a weights file of today's classes.

    Raises:
        SourceError: it holds tensors of classes that are gone.
    """
    if TORCH_BIN.writes(path) and ((old := read_bin(folder / path)).legacy or not old.archive):
        raise SourceError(
            f"{folder / path} is of an older torchao or torch, which today's do not load",
            hint="aoconvert migrate writes it in the tensor classes of today",
        )
    return open_stored(folder / path)


def _source(source: FolderSource, files: list[FileEntry]) -> SourceEntry:
    card = read_card(source)
    return SourceEntry(kind="folder", license=card.license if card else None, card=card, files=files)


def _file(folder: Path, path: str) -> FileEntry:
    place = folder / path
    return FileEntry(path=path, size=place.stat().st_size, sha256=file_sha256(place))


def _sort(
    source: FolderSource, layout: ModelLayout, quantized: Sequence[_Model], models: Sequence[_Model]
) -> tuple[list[FileEntry], list[manifests.LeftBehindEntry]]:
    """What is copied, and what stays behind, with the reason."""
    read = [path for model in models for path in model.files.paths]
    options = QuantizeOptions("int8wo", trust_remote_code=True)  # code is copied; nothing here runs it
    copies, left = sort_files(source, layout, [model.component for model in quantized], read, options)
    if (problem := next(unread_pickles(source, copies), None)) is not None:
        raise SourceError(problem)
    files = [_file(source.root, item.source) for item in copies]
    return files, [manifests.LeftBehindEntry(path=item.path, reason=item.reason) for item in left]


def _others(model: _Model) -> dict[str, str]:
    return {str(name): "not a tensor" for stored in model.opened.values() for name in stored.contents.others}


def _refuse_twice(folder: Path, model: _Model) -> None:
    counts = Counter(name for _, name, _ in model.tensors)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise SourceError(
            f"{folder}: tensor {twice!r} is in two weights files",
            hint="remove the file that does not belong to the checkpoint",
        )


def _quantization(folder: Path, component: ModelPart) -> Mapping[str, Any]:
    """The torchao config by which the library opens the model.

    Raises:
        SourceError: its config.json does not have one in the form of today.
    """
    place = folder / join(component.folder, "config.json")
    found = component.config.get("quantization_config")
    kind = found.get("quant_type") if isinstance(found, dict) and found.get("quant_method") == "torchao" else None
    config = kind.get("default") if isinstance(kind, dict) else None
    if not isinstance(found, dict) or not isinstance(config, dict):
        raise SourceError(
            f"{place} does not say how torchao quantized the weights, as the libraries of today read it",
            hint="aoconvert migrate writes a .bin with such a config; for safetensors add the quantization_config",
        )
    try:
        check_quantization(found)
    except ValueError as error:
        raise SourceError(f"{place}: the quantization_config: {error}", hint="do not use this checkpoint") from error
    return config


def _component(folder: Path, model: _Model) -> ComponentEntry:
    """Describe a quantized model."""
    _refuse_twice(folder, model)
    component, config = model.component, _quantization(folder, model.component)
    specs = _specs(model)
    tensors = [*_tensors(model, specs), *_tied(model, specs)]
    entries = [tensor for _, _, tensor in model.tensors if tensor.inner]
    schemes = _by_size(tensors)
    layout = _layout(config, entries)
    dtype = _base_dtype(tensors)
    names = {use.name for stored in model.opened.values() for use in stored.contents.globals}
    names |= {tensor.class_name for tensor in entries}
    span = find_written({use.name for file in model.opened.values() for use in file.contents.globals}, entries)
    foreign = sorted(name for name in names if name.startswith("torchao."))
    format_ = model.files.format
    assert format_ != "gguf"  # a folder's weights
    return ComponentEntry(
        name=component.name,
        path=component.folder,
        library=component.library,
        class_name=component.class_name,
        module=component.module,
        scheme="+".join(schemes),
        config=dict(config),
        dtype=dtype,
        layout=layout_entry(layout, None),
        format=format_,
        files=[
            *(_file(folder, path) for path in model.files.paths),
            _file(folder, join(component.folder, "config.json")),
        ],
        safe_globals=foreign,
        imports=imports(foreign),
        load=manifests.LoadEntry(
            strategy="from_pretrained",
            class_name=component.class_name,
            kwargs={"torch_dtype": dtype} if component.library == "diffusers" else {},
        ),
        loads_with={"torch": ">=2.6"},
        rules=dict(rule_schemes(config, layout.device)) if len(schemes) > 1 else None,
        converted=ConvertedEntry(
            kind="torchao",
            format=format_,
            written_by=None if span is None else " to ".join(dict.fromkeys(f"{short(at)}" for at in span)),
        ),
        dropped=[manifests.LeftOutEntry(name=name, reason=why) for name, why in _others(model).items()],
        tensors=tensors,
        totals=_totals(tensors),
    )


def _unquantized(folder: Path, model: _Model) -> UnquantizedEntry:
    """Describe a part of a pipeline that is not quantized."""
    _refuse_twice(folder, model)
    if others := _others(model):
        raise SourceError(f"{folder}: {model.component.title}: {next(iter(others))!r} in its weights is not a tensor")
    return UnquantizedEntry(
        name=model.component.name,
        path=model.component.folder,
        library=model.component.library,
        class_name=model.component.class_name,
        files=[_file(folder, path) for path in model.files.paths],
        tensors=[
            StoredEntry(name=name, dtype=tensor.dtype, shape=tensor.shape, sha256="", file=path)
            for path, name, tensor in model.tensors
        ],
    )


def _tensors(model: _Model, specs: Mapping[str, TensorSpec]) -> Iterator[TensorEntry]:
    """Each tensor of the files, in their order, as torchao makes it; its digest is not taken."""
    for path, name, stored in model.tensors:
        made: Any = model.opened[path].like(name)
        names = data_names(made)
        yield TensorEntry(
            name=name,
            shape=tuple(made.shape),
            dtype=dtype_name(made.dtype),
            action="quantize" if names else "keep",
            reason=None if names else _NOT_QUANTIZED,
            scheme=scheme_of(stored) or type(made).__name__ if names else None,
            kind=specs[name].kind if name in specs else None,
            class_name=f"{type(made).__module__}.{type(made).__qualname__}" if names else "torch.Tensor",
            data_names=names,
            bytes_in=stored.nbytes,
            bytes_out=stored.nbytes,
            file=path,
        )


def _tied(model: _Model, specs: Mapping[str, TensorSpec]) -> Iterator[TensorEntry]:
    """Tensors of the model that its files leave out, as they are others."""
    held = {name: (path, tensor) for path, name, tensor in model.tensors}
    for spec in specs.values():
        if spec.name not in held and spec.tied_to in held:
            path, _ = held[spec.tied_to]
            yield TensorEntry(
                name=spec.name,
                shape=spec.shape,
                dtype=dtype_name(model.opened[path].like(spec.tied_to).dtype),
                action="tied",
                reason=f"tied to {spec.tied_to}",
                kind=spec.kind,
                class_name="torch.Tensor",
                bytes_in=0,
                bytes_out=0,
            )


def _specs(model: _Model) -> dict[str, TensorSpec]:
    """What the model's class says of its tensors; nothing where it cannot be built (its code is in the checkpoint)."""
    component = model.component
    config = {name: value for name, value in component.config.items() if name != "quantization_config"}
    held = Held.of(max(tensor.nbytes, _numel(tensor.shape)) for _, _, tensor in model.tensors)
    check_config(component.title, config, held)
    try:
        with limit_model(component.title, held):
            return {spec.name: spec for spec in build_skeleton(replace(component, config=config), torch.bfloat16)}
    except AoconvertError:
        return {}


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _by_size(tensors: Sequence[TensorEntry]) -> list[str]:
    """The schemes, that of most parameters first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.scheme is not None:
            sizes[tensor.scheme] += _numel(tensor.shape)
    return [scheme for scheme, _ in sizes.most_common()]


def _base_dtype(tensors: Sequence[TensorEntry]) -> str:
    """What most values appear as."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in DTYPES:
            sizes[tensor.dtype] += _numel(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else "bfloat16"


def _layout(config: Mapping[str, Any], entries: Sequence[BinTensor]) -> Layout:
    """What the weights are packed for: by the schemes of the config, where there are such, else by their classes."""
    demand = demand_of_entries(entries)
    device = demand.device if demand is not None else "any"
    try:
        section = from_config(config, "config.json", device if device != "any" else None)
        choices = [rule.choice for rule in section.rules] + ([section.default] if section.default else [])
        layouts = [
            get(
                str(choice.scheme),
                group_size=choice.group_size,
                settings=dict(choice.settings),
                layout_device=choice.layout_device,
            ).layout
            for choice in choices
            if choice.scheme
        ]
    except AoconvertError:
        layouts = []
    if layouts:
        return merge(layouts)
    return replace(UNPACKED, device=device, min_capability=demand.min_capability if demand is not None else None)


def _totals(tensors: Sequence[TensorEntry]) -> manifests.Totals:
    quantized = [tensor for tensor in tensors if tensor.action == "quantize"]
    parameters = sum(_numel(tensor.shape) for tensor in tensors if tensor.action != "tied")
    embeddings = sum(_numel(t.shape) for t in tensors if t.kind == "embedding" and t.action != "tied")
    outside = sum(_numel(tensor.shape) for tensor in quantized if tensor.kind != "embedding")
    bytes_out = sum(tensor.bytes_out for tensor in tensors)
    return manifests.Totals(
        tensors=len(tensors),
        parameters=parameters,
        quantized_parameters=sum(_numel(tensor.shape) for tensor in quantized),
        quantized_fraction=outside / (parameters - embeddings) if parameters > embeddings else 0.0,
        bytes_in=sum(tensor.bytes_in for tensor in tensors),
        bytes_out=bytes_out,
        bits_per_weight=8 * bytes_out / parameters if parameters else 0.0,
    )
