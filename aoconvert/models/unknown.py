"""What a folder is that is not a model: an adapter, weights in another format, a single file. Imports no torch."""

from __future__ import annotations

import contextlib
import posixpath
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.humanize import argument

if TYPE_CHECKING:
    from aoconvert.sources import Source

_ADAPTER = "adapter_config.json"  # peft.utils.CONFIG_NAME
_LORA = re.compile(r"(pytorch_lora_weights|adapter_model|.*[-_.]lora|lora[-_.].*)\.(safetensors|bin)", re.IGNORECASE)
_ORIGINAL = "start from the original weights, as safetensors or .bin"
# weights that are not read, by file name → the format's name, what to do; the first that is there is named
_FORMATS = (
    (r"adapter_model\.(safetensors|bin)", "an adapter", "give its base model, and the adapter with --lora"),
    (r".*\.gguf", "GGUF", "give the file itself"),
    (r"tf_model.*\.h5|.*\.h5", "TensorFlow", "from_pretrained(…, from_tf=True) of transformers 4 and save_pretrained"),
    (r".*\.msgpack", "Flax", "from_pretrained(…, from_flax=True) of transformers 4 and save_pretrained"),
    (r".*\.onnx(_data)?|.*\.ort", "ONNX", _ORIGINAL),
    (r"openvino_model.*\.(bin|xml)|.*\.xml", "OpenVINO", _ORIGINAL),
    (r".*\.(tflite|mlmodel|mlpackage|mnn|llamafile)", "an on-device format", _ORIGINAL),
    (r"consolidated.*\.(pth|safetensors)", "the authors' own format", "use the repo in transformers' layout (-hf)"),
    (r".*\.(ckpt|pth|pt|safetensors|bin)", "a name that the library does not look for", ""),
)


def explain_unknown(source: Source, folder: str) -> SourceError:
    """The error for a folder without ``config.json`` and ``model_index.json``; to be raised."""
    where = f"{source.label}/{folder}" if folder else source.label
    names = _names(source, folder)
    if _ADAPTER in names or any(_LORA.fullmatch(name) for name in names):
        return _adapter(source, folder, where)
    weights = [name for name in names if name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))]
    missing = f"{where} has no config.json and no model_index.json"
    if files := [name for name in names if name.endswith(".gguf")]:
        return SourceError(f"{missing}, only GGUF weights ({', '.join(files)})", hint=_choose(source, folder, files))
    if weights:
        return SourceError(
            f"{missing}, only weights ({', '.join(weights[:2])}{', …' if len(weights) > 2 else ''})",
            hint="to quantize a single file in its authors' format, give the file itself; --config names the diffusers "
            "model whose config it has",
        )
    if inner := _models_below(source, folder):
        return SourceError(missing, hint=f"its subfolders hold models: --subfolder {', '.join(inner[:3])}")
    return SourceError(
        missing, hint="give the folder of a diffusers pipeline, a diffusers model or a transformers model"
    )


def _choose(source: Source, folder: str, files: list[str]) -> str:
    """How to give one of the GGUF files in a folder or repo."""
    path = posixpath.join(folder, files[0])
    if source.repo_id is not None:
        return f"download one, and give the file itself: hf download {source.repo_id} {path} --local-dir FOLDER"
    which = "the file itself" if len(files) == 1 else "one of the files itself"
    return f"give {which}: aoconvert quantize {argument(str(source.root / path))} --scheme …"


def _adapter(source: Source, folder: str, where: str) -> SourceError:
    base = None
    with contextlib.suppress(SourceError, AttributeError):
        base = source.read_json(posixpath.join(folder, _ADAPTER)).get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    return SourceError(
        f"{where} is an adapter (LoRA){of}, not a model",
        hint="give its base model, and the adapter with --lora; or merge it first (peft: merge_and_unload, diffusers: "
        "fuse_lora), and give the merged model",
    )


def other_weights(source: Source, folder: str) -> str | None:
    """In which other form the weights of a model without readable ones lie there, and what to do; ``None``: in none."""
    names = _names(source, folder)
    for pattern, form, advice in _FORMATS:
        found = [name for name in names if re.fullmatch(pattern, name, re.IGNORECASE)]
        if found:
            return f"only {form} ({found[0]})" + (f"; {advice}" if advice else "")
    return None


def check_class_keys(source: Source, path: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that names its class in a way that nobody reads.

    Raises:
        SourceError: ``_class_name``, ``architectures`` or ``model_type`` is of the wrong type.
    """
    for key in ("_class_name", "model_type"):
        if config.get(key) is not None and not isinstance(config[key], str):
            raise SourceError(
                f"{source.label}: {path}: {key} is not a string: {_short(config[key])}", hint="correct it"
            )
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(item, str) for item in classes)):
        raise SourceError(
            f"{source.label}: {path}: architectures is not a list of class names: {_short(classes)}", hint="correct it"
        )


def _names(source: Source, folder: str) -> list[str]:
    """Names of the files in a folder itself."""
    prefix = f"{folder}/" if folder else ""
    rest = (path.removeprefix(prefix) for path in source.files() if path.startswith(prefix))
    return [name for name in rest if "/" not in name]


def _models_below(source: Source, folder: str) -> list[str]:
    """Folders in a folder that hold a pipeline, or a config that names a model's class."""
    found = []
    for path in sorted(source.files()):
        place, name = posixpath.split(path)
        if place and posixpath.dirname(place) == folder and name in ("config.json", "model_index.json"):
            config = {}
            with contextlib.suppress(SourceError):
                config = source.read_json(path)
            if isinstance(config, dict) and not {"_class_name", "architectures"}.isdisjoint(config):
                found.append(place)
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
