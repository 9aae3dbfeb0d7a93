"""What of a source is taken over as it is, and what is left behind, each file with the reason.

Everything that is not weights arrives, unless a rule here says why not: nobody can list the names that all tokenizers
and processors read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aoconvert.checkpoint.manifest import OWN_NAMES
from aoconvert.errors import SourceError
from aoconvert.formats.registry import FORMATS, TORCH_BIN
from aoconvert.models import ModelLayout, ModelPart, join
from aoconvert.options import QuantizeOptions
from aoconvert.planning.types import CopyPlan, LeftBehind
from aoconvert.planning.unquantized import ONNX
from aoconvert.planning.weights import is_only, weights_of
from aoconvert.sources.adapters import adapter_files
from aoconvert.sources.weights import variant_of

if TYPE_CHECKING:
    from aoconvert.sources import Source

CARD = "the result has its own model card"
CODE = "code; --trust-remote-code copies it"
ADAPTER = "part of an adapter that lacks its config or its weights; no library loads it"
ONLY = "belongs to the pipeline around the component"

_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[^/]*", re.IGNORECASE)
_EXTENSIONS = (
    r"safetensors|bin|pt|pth|ckpt|h5|hdf5|keras|msgpack|onnx|onnx[._]data[^/]*|pb|gguf|ggml|ot|tflite|mlmodel|pkl|pickle"
    r"|joblib|llamafile|nemo|pte|flashpack|distcp|data-\d{5}-of-\d{5}"
)
_WEIGHTS = re.compile(rf"(.*/)?[^/]+\.({_EXTENSIONS})|(.*/)?(flax_)?(model|weights)[^/]*\.npz", re.IGNORECASE)

# path below the model's folder → why it is left behind; the first that matches counts
_RULES = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"(.*/)?\.[^/]+(/.*)?", "hidden"),
        (r"(.*/)?__pycache__/.*|.*\.(lock|tmp|partial|incomplete)", "a cache, or an unfinished download"),
        (r"readme\.md", CARD),
        ("|".join(map(re.escape, sorted(OWN_NAMES))), "the result has its own"),
        (r"(.*/)?quanto_qmap\.json", "it says how Quanto quantized the weights, which are not copied"),
        (r"(.*/)?hf_quant_config\.json", "it says how ModelOpt quantized the weights, which are not copied"),
        (r"(.*/)?adapter_(config\.json|model\.[^/]+)", ADAPTER),
        (
            r"(.*/)?(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state)[^/]*\.(pt|pth|bin|pkl)"
            r"|(.*/)?(trainer_state\.json|zero_to_fp32\.py|events\.out\.tfevents[^/]*)"
            r"|latest|(.*/)?(checkpoint-\d+|global_step\d+|wandb|runs)/.*",
            "training state",
        ),
        (
            r"(.*/)?(onnx|openvino|coreml|tflite|tensorrt|executorch|gguf|ggml|mlx|flax)[^/]*/.*"
            r"|.*\.(mlpackage|mlmodelc)/.*|(.*/)?openvino[^/]*\.(xml|bin|json)",
            "an export to another format",
        ),
    )
)


@dataclass
class _Sorting:
    """Goes through the source's files, folder by folder.

    Attributes:
        read: files that are read tensor by tensor, or written anew.
        code: take Python files over.
        adapters: files of adapters, which the library loads with the weights beside them.
    """

    source: Source
    read: frozenset[str]
    code: bool
    adapters: frozenset[str] = frozenset()
    copied: dict[str, CopyPlan] = field(default_factory=dict)
    left: list[LeftBehind] = field(default_factory=list)

    def sort(self, folder: str, into: str, *, apart: Sequence[str] = (), kept: Sequence[str] = ()) -> None:
        """Sort what is in a model's folder.

        Args:
            folder: in the source.
            into: in the output.
            apart: folders in it that are sorted on their own.
            kept: folders in it whose weights are taken over, too.
        """
        prefix = f"{folder}/" if folder else ""
        inside = [path.removeprefix(prefix) for path in self.source.files() if path.startswith(prefix)]
        inside = [rest for rest in inside if not any(rest.startswith(f"{other}/") for other in apart)]
        others = _folders_of_weights([rest for rest in inside if not _within(rest, kept)])
        for rest in inside:
            path = prefix + rest
            if path in self.read:
                continue
            reason = None if path in self.adapters else self._reason(rest, others, kept=_within(rest, kept))
            if reason is None:
                self.take(path, join(into, rest))
            else:
                self.left.append(LeftBehind(path, reason))

    def take(self, path: str, into: str, drop: str | None = None) -> None:
        """Take a file over."""
        self.copied[into] = CopyPlan(path, into, self.source.files()[path].size, drop)

    def leave_the_rest(self, folder: str, component: str) -> None:
        """Leave behind what is in a pipeline's folder but not in its component's, but for the licence beside both."""
        prefix = f"{folder}/" if folder else ""
        for path in self.source.files():
            rest = path.removeprefix(prefix)
            if not path.startswith(prefix) or path.startswith(f"{component}/"):
                continue
            if _TERMS.fullmatch(rest) and rest not in self.copied:
                self.take(path, rest)
            else:
                self.left.append(LeftBehind(path, ONLY))

    def _reason(self, rest: str, others: Sequence[str], *, kept: bool) -> str | None:
        """Why a file is left behind, or ``None``."""
        for pattern, reason in _RULES:
            if pattern.fullmatch(rest):
                return reason
        if rest.endswith(".py") and not self.code:
            return CODE
        if kept and (any(entry.writes(rest) for entry in FORMATS.values()) or not _WEIGHTS.fullmatch(rest)):
            return None
        if other := next((folder for folder in others if rest.startswith(f"{folder}/")), None):
            return f"{other}/ holds weights that do not belong to this model"
        if rest.endswith(".json") and ".index." in rest.rpartition("/")[2]:
            return "an index of weights that are not copied"
        if _WEIGHTS.fullmatch(rest):
            variant = variant_of(rest)
            return f"weights of the variant {variant}" if variant is not None else "other weights"
        return None


def sort_files(
    source: Source,
    layout: ModelLayout,
    chosen: Sequence[ModelPart],
    read: Sequence[str],
    options: QuantizeOptions,
) -> tuple[tuple[CopyPlan, ...], tuple[LeftBehind, ...]]:
    """Sort every file of the source.

    Args:
        source: the source.
        layout: what it holds.
        chosen: the models that are quantized: their configs are written anew.
        read: files whose tensors are written anew.
        options: ``component_only``: the rest of the pipeline is not looked at; ``trust_remote_code``: take the
            checkpoint's own code over; ``keep_original_files``: take the weights of the other parts over unchanged,
            without ``variant`` in their names, so that plain ``from_pretrained`` finds them.

    Returns:
        What is taken over, by its path in the output, and what is left behind.

    Raises:
        SourceError: weights that are to be taken over are damaged.
    """
    only = is_only(layout, options)
    anew = {join(component.folder, "config.json") for component in chosen}
    models = [component for component in layout.components if component.library == "transformers"]
    adapters = {path for component in models for path in adapter_files(source, component.folder)}
    sorting = _Sorting(source, frozenset(read) | anew, options.trust_remote_code, frozenset(adapters))
    if layout.kind == "pipeline" and not only:
        parts = [part for part in layout.parts if part.folder != layout.folder]
        names = {part.folder: part.folder.rpartition("/")[2] for part in parts}
        if options.keep_original_files:
            sorting.read |= _take_weights(sorting, layout, chosen, options.variant)
        sorting.sort(layout.folder, "", apart=list(names.values()))
        for part in parts:
            if part.class_name == ONNX:
                sorting.read |= _take_onnx(sorting, layout, part.folder)
            sorting.sort(part.folder, names[part.folder])
    else:
        folder = chosen[0].folder if chosen else layout.folder
        kept = _modules(source, folder) if layout.kind == "transformers" else []
        sorting.sort(folder, "", kept=kept)
        if only:
            sorting.leave_the_rest(layout.folder, folder)
    sorting.left += [LeftBehind(path, "hidden") for path in source.hidden_folders()]
    copied = tuple(sorting.copied[path] for path in sorted(sorting.copied))
    return copied, tuple(sorted(sorting.left, key=lambda item: item.path))


def _take_weights(
    sorting: _Sorting, layout: ModelLayout, chosen: Sequence[ModelPart], variant: str | None
) -> frozenset[str]:
    """Take the weights of the parts that were not chosen over; gives their paths."""
    folders = {component.folder for component in chosen}
    taken: set[str] = set()
    for component in layout.components:
        weights = None if component.folder in folders else weights_of(sorting.source, component, variant)
        for path in weights.paths if weights is not None else ():
            into = path.removeprefix(f"{layout.folder}/" if layout.folder else "")
            plain = drop_variant(into, variant)
            sorting.take(path, plain, variant if plain != into else None)
            taken.add(path)
    return frozenset(taken)


def _take_onnx(sorting: _Sorting, layout: ModelLayout, folder: str) -> frozenset[str]:
    """Take the weights of a part over that onnxruntime opens; gives their paths."""
    inside = (path for path in sorting.source.files() if path.startswith(f"{folder}/"))
    weights = frozenset(path for path in inside if re.fullmatch(r".*\.(onnx[^/]*|pb)", path))
    for path in weights:
        sorting.take(path, path.removeprefix(f"{layout.folder}/" if layout.folder else ""))
    return weights


def drop_variant(path: str, variant: str | None) -> str:
    """``model.fp16.safetensors`` → ``model.safetensors``."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.replace(f".{variant}", "", 1) if variant else name)


def _within(rest: str, folders: Sequence[str]) -> bool:
    return any(not folder or rest.startswith(f"{folder}/") for folder in folders)


def _folders_of_weights(inside: Sequence[str]) -> list[str]:
    """Folders that hold weights themselves: what else is in them belongs to these."""
    found = {rest.rpartition("/")[0] for rest in inside if _WEIGHTS.fullmatch(rest)} - {""}
    return sorted(found)


def _modules(source: Source, folder: str) -> list[str]:
    """Folders that ``modules.json`` of a sentence-transformers model names (pooling, dense layers)."""
    path = join(folder, "modules.json")
    if not source.has(path):
        return []
    try:
        entries = source.read_json(path)
        named = [entry["path"] for entry in entries if entry.get("path") and ".." not in entry["path"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [str(name).rstrip("/") for name in named]


def unread_pickles(source: Source, copied: Sequence[CopyPlan]) -> Iterator[str]:
    """What is wrong with torch files that are taken over: nobody else has looked into them."""
    from aoconvert.formats.torch_bin.reader import TorchBinReader

    for item in copied:
        if TORCH_BIN.writes(item.source) and source.is_local(item.source):
            try:
                TorchBinReader(source.local(item.source)).close()
            except SourceError as error:
                yield error.message
