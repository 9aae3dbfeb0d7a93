"""Which file holds which tensor, and which files are taken over as they are."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from aoconvert.errors import SourceError
from aoconvert.models import Component, ModelLayout, join
from aoconvert.planning.types import CopyPlan, TensorPlan
from aoconvert.sources.weights import find_weights

if TYPE_CHECKING:
    from aoconvert.sources import Source

# The Hub takes files below 50 GB; diffusers cannot open a sharded .bin without being told (diffusers#14811).
DIFFUSERS_FILE_BYTES = 45 * 10**9
TRANSFORMERS_FILE_BYTES = 10 * 10**9

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "pytorch_model"}

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ot|tflite|mlmodel|npz|pkl|pickle|xml|llamafile)"
    r"|.*\.index(\..+)?\.json|.*\.onnx_data.*",
    re.IGNORECASE,
)
_TAKEN = re.compile(
    r".*\.(json|jsonl|txt|model|jinja|tiktoken|spm|vocab|merges|yaml|yml|bpe)|(.*/)?(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[^/]*",
    re.IGNORECASE,
)


def weights_name(component: Component, number: int, count: int) -> str:
    """File name the component's library looks for; ``number`` counts from 1."""
    stem = _STEMS[component.library]
    return f"{stem}.bin" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.bin"


def index_name(component: Component) -> str:
    """Name of the index beside sharded weights."""
    return f"{_STEMS[component.library]}.bin.index.json"


def assign(tensors: Sequence[TensorPlan], order: Sequence[str], limit: int) -> list[list[str]]:
    """Deal the tensors to files of at most ``limit`` bytes of tensors, in the order they will be written.

    A tensor larger than the limit gets a file of its own.
    """
    sizes = {tensor.name: tensor.bytes_out for tensor in tensors if tensor.action != "tied"}
    names = [name for name in order if name in sizes]
    ordered = set(names)
    names += [name for name in sizes if name not in ordered]
    files: list[list[str]] = [[]]
    used = 0
    for name in names:
        if files[-1] and used + sizes[name] > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += sizes[name]
    return files


def copies(
    source: Source, layout: ModelLayout, chosen: Sequence[Component], *, only: bool, variant: str | None, code: bool
) -> tuple[CopyPlan, ...]:
    """Files that are taken over: configs, tokenizers, and the parts of a pipeline that are not quantized.

    The source's ``README.md`` is left behind (the result gets a card of its own), and so are weights in other
    formats. ``variant`` is dropped from the names of the files it selected, so that plain ``from_pretrained`` finds
    them.
    """
    files = source.files()
    quantized = {component.folder for component in chosen}
    found: dict[str, str] = {}

    def take_small(folder: str, into: str, *, deep: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        for path in files:
            rest = path.removeprefix(prefix)
            if not path.startswith(prefix) or ("/" in rest and not deep) or _hidden(rest):
                continue
            if not _WEIGHTS.fullmatch(rest) and (_TAKEN.fullmatch(rest) or (code and rest.endswith(".py"))):
                found[join(into, rest)] = path

    if layout.kind == "pipeline" and not only:
        take_small(layout.folder, "", deep=False)
        for part in layout.parts:
            folder = join(layout.folder, part)
            take_small(folder, part, deep=True)
            component = layout.component(part)
            if component is not None and folder not in quantized:
                found.update(_weights_of(source, component, part, variant))
    else:
        folder = chosen[0].folder if chosen else layout.folder
        take_small(folder, "", deep=False)
        if layout.kind == "transformers":
            for extra in _sentence_transformers_parts(source, folder):
                prefix = join(folder, extra)
                found.update(
                    {
                        path.removeprefix(f"{folder}/" if folder else ""): path
                        for path in files
                        if path.startswith(f"{prefix}/")
                    }
                )
    for component in chosen:  # written anew, with its quantization_config
        found.pop(join("" if only or layout.kind != "pipeline" else component.name, "config.json"), None)
    return tuple(
        CopyPlan(path, out, files[path].size, variant if path.rpartition("/")[2] != out.rpartition("/")[2] else None)
        for out, path in sorted(found.items())
    )


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _weights_of(source: Source, component: Component, into: str, variant: str | None) -> Mapping[str, str]:
    """Output path → source path of the weights of a part that stays as it is."""
    available = None
    if variant is not None:  # like diffusers: a part without this variant is taken as it is
        with contextlib.suppress(SourceError):
            available = find_weights(source, component.folder, component.library, variant=variant)
    if available is None:
        available = find_weights(source, component.folder, component.library)
    if available is None:
        return {}
    prefix = f"{component.folder}/" if component.folder else ""
    return {join(into, drop_variant(path.removeprefix(prefix), variant)): path for path in available.paths}


def drop_variant(path: str, variant: str | None) -> str:
    """``model.fp16.safetensors`` → ``model.safetensors``."""
    return path.replace(f".{variant}", "", 1) if variant else path


def _sentence_transformers_parts(source: Source, folder: str) -> list[str]:
    """Folders that ``modules.json`` of a sentence-transformers model names (pooling, dense layers)."""
    path = join(folder, "modules.json")
    if not source.has(path):
        return []
    try:
        entries = json.loads(source.read_text(path))
        return [entry["path"] for entry in entries if entry.get("path") and ".." not in entry["path"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def partial_folder(output: Path) -> Path:
    """Where a run builds what will be ``output``, and leaves what it has when it is stopped."""
    place = output.absolute()
    return place.parent / f".{place.name}.aoconvert-partial"
