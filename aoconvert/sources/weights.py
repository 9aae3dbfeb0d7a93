"""Which files hold a component's weights, by the names diffusers and transformers know.

Source of the names: ``diffusers.utils.constants``, ``transformers.utils`` and both libraries' ``_add_variant``; of the
order of preference: their ``from_pretrained``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aoconvert.errors import SourceError
from aoconvert.json_text import INDEX_BYTES
from aoconvert.sources.base import Source, is_safe_path, show

Library = Literal["diffusers", "transformers"]
Format = Literal["bin", "safetensors"]
SourceFormat = Literal["bin", "safetensors", "gguf"]

STEMS: dict[Library, dict[Format, str]] = {
    "diffusers": {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
    "transformers": {"safetensors": "model", "bin": "pytorch_model"},
}


_SINGLE: dict[str, SourceFormat] = {".safetensors": "safetensors", ".gguf": "gguf"}
NAMED_BY = "transformers_weights"
_INDEX = ".safetensors.index.json"
_ADAPTER = "adapter_model.bin"
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of one component.

    Attributes:
        format: of every file.
        files: paths relative to the source's root, sorted.
        index: tensor name → file, as the index says; ``None`` for one file without an index.
        index_file: the index itself.
    """

    format: SourceFormat
    files: tuple[str, ...]
    index: Mapping[str, str] | None
    index_file: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file that has to be there to read them."""
        return (*self.files, self.index_file) if self.index_file else self.files


def find_weights(
    source: Source,
    folder: str,
    library: Library,
    *,
    variant: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> WeightFiles | None:
    """Find the weights that the library would load for a component; nothing but an index is read.

    Args:
        source: where to look.
        folder: the component's folder, relative to the source's root; ``""`` is the root.
        library: whose file names to look for. safetensors come before ``.bin``; within a format diffusers prefers an
            index to a single file, transformers a single file to an index.
        variant: ``"fp16"`` for ``diffusion_pytorch_model.fp16.safetensors`` and its like.
        config: the component's; one of transformers may name its weights file, which goes before all others.

    Returns:
        ``None`` where the folder has no weights at all.

    Raises:
        SourceError: the variant is not there; only variants are there and none was asked for; shards without an index;
            an index that is damaged, names an absent file, or a file outside the folder; a config that names a file
            that is not there, or that transformers refuses; a distributed checkpoint, which goes before all others.
        HubError: the index could not be fetched.
    """
    if (single := source.weights_file) is not None:
        suffix = posixpath.splitext(single)[1].lower()
        return WeightFiles(_SINGLE.get(suffix, "bin"), (single,), None)
    folder, variant = folder.strip("/"), variant or None
    if folder and not is_safe_path(folder):
        raise SourceError(f"{source.label}: {show(folder)} is not a folder inside the source")
    if library == "transformers":
        _refuse_distributed(source, folder)
        if (named := (config or {}).get(NAMED_BY)) is not None:
            return _named_weights(source, folder, named)
    for format_ in ("safetensors", "bin"):
        stem = STEMS[library][format_]
        single = posixpath.join(folder, f"{_with_variant(stem, variant)}.{format_}")
        indexes = [posixpath.join(folder, name) for name in _index_names(f"{stem}.{format_}", library, variant)]
        for path in [*indexes, single] if library == "diffusers" else [single, *indexes]:
            if source.has(path):
                source.require(path)
                return WeightFiles(format_, (path,), None) if path == single else _read_index(source, path, format_)
    _explain_absence(source, folder, library, variant)
    return None


def _named_weights(source: Source, folder: str, name: Any) -> WeightFiles:
    """The file that ``transformers_weights`` of a config names: a safetensors file, an index of them, or one ``.bin``.

    Source: ``transformers.modeling_utils._get_resolved_checkpoint_files``.
    """
    where = f"{source.label}: {posixpath.join(folder, 'config.json')}: {NAMED_BY}"
    if not isinstance(name, str) or not (name.endswith((".safetensors", _INDEX)) or name == _ADAPTER):
        raise SourceError(
            f"{where} is {show(str(name))}, a file that transformers does not load",
            hint=f"remove {NAMED_BY} from the config to use the usual file names",
        )
    if not is_safe_path(name):
        raise SourceError(f"{where} is {show(name)}, which is outside the folder", hint="do not use this checkpoint")
    path = posixpath.join(folder, name)
    if not source.has(path):
        raise SourceError(f"{where} is {show(name)}, which does not exist", hint="the download or copy is incomplete")
    source.require(path)
    if name.endswith(_INDEX):
        return _read_index(source, path, "safetensors")
    return WeightFiles("bin" if name == _ADAPTER else "safetensors", (path,), None)


def _refuse_distributed(source: Source, folder: str) -> None:
    """Shards that each process of a training run wrote: where a folder has them, transformers reads nothing else.

    Source: ``transformers.distributed.checkpoint.is_sharded_checkpoint``; it looks into folders, not into repos.
    """
    if source.kind != "folder":
        return
    for path in source.files():
        if posixpath.dirname(path) == folder and _DISTRIBUTED.fullmatch(posixpath.basename(path)):
            raise SourceError(
                f"{source.label}: {path} belongs to a distributed checkpoint, which transformers loads instead of "
                f"the other weights",
                hint="open it with from_pretrained, and save it with save_pretrained",
            )


def _with_variant(stem: str, variant: str | None) -> str:
    return stem if variant is None else f"{stem}.{variant}"


def _index_names(weights_name: str, library: Library, variant: str | None) -> list[str]:
    """``x.safetensors.index.fp16.json``, and where diffusers looks next, ``x.safetensors.fp16.index.json``."""
    if variant is None:
        return [f"{weights_name}.index.json"]
    names = [f"{weights_name}.index.{variant}.json"]
    if library == "diffusers":
        names.append(f"{weights_name}.{variant}.index.json")
    return names


def _read_index(source: Source, path: str, format_: Format) -> WeightFiles:
    """Read an index and check every shard it names, before any shard is opened."""
    source.fetch([path])
    content = source.read_json(path, INDEX_BYTES)
    where = f"{source.label}: {path}"
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise SourceError(f"{where} has no weight_map", hint="download the index again, or save the model again")
    if not weight_map:
        raise SourceError(f"{where} names no tensor: its weight_map is empty")
    folder = posixpath.dirname(path)
    places: dict[str, str] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise SourceError(f"{where}: the shard of tensor {show(tensor)} is not a file name")
        if shard not in places:
            places[shard] = _check_shard(source, where, folder, shard, format_)
    index = {tensor: places[shard] for tensor, shard in weight_map.items()}
    return WeightFiles(format_, tuple(sorted(places.values())), index, path)


def _check_shard(source: Source, where: str, folder: str, shard: str, format_: Format) -> str:
    """A shard's path relative to the source's root."""
    if not is_safe_path(shard):
        raise SourceError(f"{where}: shard {show(shard)} is outside the folder", hint="do not use this checkpoint")
    if not shard.endswith(f".{format_}"):
        raise SourceError(f"{where}: shard {show(shard)} is not a .{format_} file")
    path = posixpath.join(folder, shard)
    if not source.has(path):
        raise SourceError(f"{where}: shard {show(shard)} does not exist", hint="the download or copy is incomplete")
    source.require(path)
    return path


def _explain_absence(source: Source, folder: str, library: Library, variant: str | None) -> None:
    """Raise the error that says what is there instead; return where there are no weights of any kind."""
    found: set[str | None] = set()
    for path in source.files():
        if posixpath.dirname(path) == folder:
            found |= _variant_of(posixpath.basename(path), library)
    if not found:
        return
    where = f"{source.label}/{folder}" if folder else source.label
    if variant in found:
        # A single file or an index would have been found.
        raise SourceError(f"{where} has shards of the weights but no index", hint="the download or copy is incomplete")
    names = sorted(name for name in found if name is not None)
    if variant is None:
        raise SourceError(
            f"{where} holds its weights only as variants: {', '.join(names)}", hint=f"choose one: --variant {names[0]}"
        )
    there = [*(["no variant"] if None in found else []), *names]
    raise SourceError(
        f"{where} has no variant {show(variant)}; there are weights for: {', '.join(there)}",
        hint="omit --variant" if None in found else f"choose one: --variant {names[0]}",
    )


def variant_of(path: str) -> str | None:
    """The variant that a weights file belongs to by its name, in either library."""
    name = posixpath.basename(path)
    return next((found for library in STEMS for found in _variant_of(name, library) if found is not None), None)


def _variant_of(name: str, library: Library) -> set[str | None]:
    """The variant that a file name belongs to (``{None}``: to none), or nothing where it names no weights."""
    for format_, stem in STEMS[library].items():
        match = _weights_pattern(stem, format_).fullmatch(name)
        if match:
            return {next((group for group in match.groups() if group), None)}
    return set()


def _weights_pattern(stem: str, format_: Format) -> re.Pattern[str]:
    """A single file, shard or index of any variant; a group that took part holds the variant."""
    stem, shard, variant = re.escape(stem), r"-\d{5}-of-\d{5}", r"([^.]+?)"
    return re.compile(
        rf"{stem}(?:\.{variant})?(?:{shard})?\.{format_}"
        rf"|{stem}{shard}\.{variant}\.{format_}"
        rf"|{stem}\.{format_}\.index\.{variant}\.json"
        rf"|{stem}\.{format_}\.{variant}\.index\.json"
        rf"|{stem}\.{format_}\.index\.json"
    )
