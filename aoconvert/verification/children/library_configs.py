"""What a checkpoint holds beside its tensors, as the library's own objects: configs, tokenizers, processors."""

from __future__ import annotations

import filecmp
import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# where it was opened from, by which version, in which dtype, and that it is quantized: these differ on purpose
_OWN = {
    "quantization_config",
    "_pre_quantization_dtype",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "transformers_version",
    "_diffusers_version",
}
# of a tokenizer's settings, those that say how it was opened, and those that are looked at one by one
_SEEN = _OWN | {"chat_template", "vocab", "merges", "added_tokens_decoder"}
_SEEN |= {"local_files_only", "backend", "is_local", "trust_remote_code", "_from_auto"}
_PREDICTION_LAYERS = {"num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"}
_INDEX = re.compile(r".*\.(safetensors|bin)\.(.+\.)?index\.(.+\.)?json")
_TEXTS = ("The quick brown fox, 12 jumps!", " naïve  café\n\tΩ 漢字 🦊", "<s>[INST] <|im_start|>x</s>")
_AUTO = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor", "AutoFeatureExtractor")


def compare_model_configs(source: Any, result: Any, *, untied: bool, dropped: bool) -> Iterator[str]:
    """``config`` and ``generation_config`` of two opened models.

    Args:
        source, result: the models.
        untied: ties were taken apart on purpose.
        dropped: tensors that the class does not use were left out on purpose, and keys that count their layers are 0.
    """
    ignored = _OWN | ({"tie_word_embeddings"} if untied else set()) | (_PREDICTION_LAYERS if dropped else set())
    for name, skipped in (("config", ignored), ("generation_config", _OWN)):
        first, second = (plain(getattr(model, name, None)) for model in (source, result))
        yield from _differences(name, first, second, skipped)


def compare_adapters(source: Path, result: Path) -> Iterator[str]:
    """Whether the library finds an adapter beside the weights."""
    utils = importlib.import_module("transformers.utils.peft_utils")
    here, there = (utils.find_adapter_config_file(str(folder), local_files_only=True) for folder in (source, result))
    if bool(here) != bool(there):
        yield f"the library finds an adapter only in the {'source' if here else 'result'}"


def compare_beside(source: Path, result: Path, *, trust: bool) -> Iterator[str]:
    """Tokenizers and processors of a model of transformers: what each auto class opens in the source."""
    transformers = importlib.import_module("transformers")
    for name in _AUTO:
        auto = getattr(transformers, name, None)
        first = _attempt(auto, source, trust)
        if isinstance(first, Exception) or auto is None:
            continue
        second = _attempt(auto, result, trust)
        if isinstance(second, Exception):
            said = (str(second).strip().splitlines() or [""])[0]
            yield f"{name} opens the source, but not the result: {type(second).__name__}: {said}"
        else:
            yield from compare_objects(name, first, second)


def compare_files(source: Path, result: Path, written: set[Path], left: set[Path]) -> Iterator[str]:
    """Files that are taken over as they are, whatever opens them: layers of sentence-transformers, vocabularies, terms.

    Args:
        source, result: the folders.
        written: files of the source that are written anew: weights, configs of what is quantized.
        left: files and folders of the source that the manifest states as left behind.
    """
    made = {path.parent for path in source.rglob("aoconvert.json")} - {source}  # results that lie in the source
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or path in written:
            continue
        if _INDEX.fullmatch(path.name) or not (left | made).isdisjoint((path, *path.parents)):
            continue
        if not (result / name).is_file():
            yield f"the file {name.as_posix()} is in the source, but not in the result"
        elif not filecmp.cmp(path, result / name, shallow=False):
            yield f"the file {name.as_posix()} differs from the source's"


def _attempt(auto: Any, folder: Path, trust: bool) -> Any:
    """What an auto class makes of a folder, or why it makes nothing of it."""
    try:
        return auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # each class fails in its own way where a folder holds nothing for it
        return error


def compare_objects(name: str, source: Any, result: Any) -> Iterator[str]:
    """Two tokenizers, processors, feature extractors, schedulers: their classes and all they say of themselves."""
    if class_of(source) != class_of(result):
        yield f"{name} is a {class_of(result)}, {class_of(source)} in the source"
        return
    if source is None:
        return
    if hasattr(source, "get_vocab"):
        yield from _tokenizers(name, source, result)
        return
    yield from _differences(name, plain(source), plain(result), _OWN)
    for attribute in getattr(source, "attributes", None) or ():  # of a processor
        yield from compare_objects(f"{name}.{attribute}", getattr(source, attribute), getattr(result, attribute, None))


def _tokenizers(name: str, source: Any, result: Any) -> Iterator[str]:
    for what, look in _LOOKS.items():
        first, second = look(source), look(result)
        if first != second:
            yield (
                f"{name}: {what} {'differ' if what.endswith('s') else 'differs'} from the "
                f"source's{_contrast(first, second)}"
            )


def _encodings(tokenizer: Any) -> list[Any]:
    found: list[Any] = []
    for text in _TEXTS:
        try:
            found.append(tokenizer(text, add_special_tokens=True)["input_ids"])
        except Exception as error:  # a tokenizer of a source may not take every text
            found.append(type(error).__name__)
    return found


def _backend(tokenizer: Any) -> str | None:
    """All that a fast tokenizer consists of: normalizer, merges, post-processor."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return hashlib.sha256(backend.to_str().encode()).hexdigest() if backend is not None else None


_LOOKS: Mapping[str, Callable[[Any], Any]] = {
    "vocabulary": lambda t: _digest(sorted(t.get_vocab().items(), key=str)),
    "special tokens": lambda t: _json(t.special_tokens_map),
    "added tokens": lambda t: _json({str(key): repr(value) for key, value in t.added_tokens_decoder.items()}),
    "chat template": lambda t: _json(getattr(t, "chat_template", None)),
    "encodings": _encodings,
    "longest input": lambda t: t.model_max_length,
    "padding and truncation sides": lambda t: [t.padding_side, t.truncation_side],
    "other settings": lambda t: _digest({k: repr(_read_path(v)) for k, v in t.init_kwargs.items() if k not in _SEEN}),
    "rules of text": _backend,
}


def class_of(value: Any) -> str | None:
    """Dotted name of an object's class, ``None`` for no object; remote code is in a module of each folder's own."""
    if value is None:
        return None
    kind = type(value)
    module = "remote" if kind.__module__.startswith("transformers_modules.") else kind.__module__
    return f"{module}.{kind.__qualname__}"


def plain(value: Any) -> Any:
    """What an object says of itself, as plain values."""
    if hasattr(value, "to_diff_dict") and hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(getattr(value, "config", None), Mapping):  # a scheduler of diffusers
        return dict(value.config)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return dict(value) if isinstance(value, Mapping) else value


def compare_pipelines(source: Any, result: Any) -> Iterator[str]:
    """The class, the parts with their classes, and what else the pipeline was registered with."""
    if class_of(source) != class_of(result):
        yield f"the pipeline is a {class_of(result)}, {class_of(source)} in the source"
    here = {name: class_of(part) for name, part in source.components.items()}
    there = {name: class_of(part) for name, part in result.components.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            yield f"the part {name} is {there.get(name) or 'not there'}, {here.get(name) or 'not there'} in the source"
    rest = [
        {key: value for key, value in pipeline.config.items() if key not in pipeline.components}
        for pipeline in (source, result)
    ]
    yield from _differences("model_index.json", rest[0], rest[1], _OWN)


def _differences(where: str, first: Any, second: Any, ignored: set[str]) -> Iterator[str]:
    """Keys whose values differ, at any depth."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in sorted((first.keys() | second.keys()) - ignored, key=str):
            yield from _differences(f"{where}.{key}", first.get(key), second.get(key), ignored)
    elif _json(_read_path(first)) != _json(_read_path(second)):
        yield f"{where} differs from the source's{_contrast(first, second)}"


def _read_path(value: Any) -> Any:
    """The value, but of a file what is in it, and of a folder that it is one: where they are differs."""
    place = Path(value) if isinstance(value, str) else Path()
    if not place.is_absolute():
        return value
    try:
        if place.is_file():
            with place.open("rb") as file:
                return [place.name, hashlib.file_digest(file, "sha256").hexdigest()]
        return "a folder" if place.is_dir() else value
    except (OSError, ValueError):  # not a path at all
        return value


def _contrast(first: Any, second: Any) -> str:
    one, other = (value if isinstance(value, str) else _json(value) for value in (first, second))
    return f" ({other} for {one})" if len(one) + len(other) < 120 else ""


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr, ensure_ascii=False)


def _digest(value: Any) -> str:
    text = _json(value).encode(errors="surrogatepass")  # a vocabulary may hold halves of characters
    return hashlib.sha256(text).hexdigest()[:12]
