"""Inputs that the libraries themselves make for a model: by its pipeline, by what prepares its inputs, by its class.

Each is a start for the search, which adds what is missing and leaves these tensors as they are. What a library cannot
do for a model is no error: there is then one start less.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .blanks import State, given
from .trial import base_dtype

Source = Literal["pipeline", "processor", "dummy_inputs", "search"]

_LARGEST = 1 << 24  # elements of one tensor
PROMPT = "A red panda reads a book"
_SIDE = 64  # pixels
_SOUND = 16000  # samples: one second, as most feature extractors are set up


@dataclass(frozen=True)
class Start:
    """Arguments to begin with, and who made them."""

    source: Source
    state: State


def from_libraries(model: Any, folders: Sequence[Path] = (), *, trust: bool = False) -> Iterator[Start]:
    """What the libraries have for a model, the most trustworthy first.

    Args:
        model: opened by its library.
        folders: where what prepares its inputs may lie.
        trust: whether code that lies there may run.
    """
    for folder in folders:
        for prepared in _prepare(folder, trust=trust):
            yield from _start("processor", model, prepared)
    yield from _start("dummy_inputs", model, _dummy_inputs(model))


def _start(source: Source, model: Any, values: Mapping[str, Any]) -> Iterator[Start]:
    """The arguments among the values that the model's forward knows, where there are any and none is too large."""
    parameters = inspect.signature(model.forward).parameters
    known = {name: value for name, value in values.items() if name in parameters and value is not None}
    sizes = [value.numel() for value in known.values() if isinstance(value, torch.Tensor)]
    if sizes and max(sizes) <= _LARGEST:
        yield Start(source, {name: given(value, base_dtype(model)) for name, value in known.items()})


def _dummy_inputs(model: Any) -> Mapping[str, Any]:
    """What the class offers for a forward pass, the first of the batch."""
    try:
        values = model.dummy_inputs
    except Exception:  # most classes of diffusers have none, others fail for their config
        return {}
    if not isinstance(values, Mapping):
        return {}
    sizes = {value.shape[0] for value in values.values() if isinstance(value, torch.Tensor) and value.dim()}
    batched = len(sizes) == 1
    return {
        name: value[:1] if batched and isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in values.items()
    }


def processor_folders(folder: Path) -> tuple[Path, ...]:
    """Where a model's processor may lie: beside it, or in a folder of its pipeline that is named after it."""
    suffix = folder.name.removeprefix("text_encoder") if folder.name.startswith("text_encoder") else None
    names = [f"tokenizer{suffix}"] if suffix is not None else []
    names += ["processor", "feature_extractor", "image_processor"]
    return tuple(path for path in (folder, *(folder.parent / name for name in names)) if _prepares(path))


_OF_PROCESSORS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def _prepares(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _OF_PROCESSORS)


def _prepare(folder: Path, *, trust: bool) -> Iterator[Mapping[str, Any]]:
    """What each processor in a folder makes of a small text, image, clip and sound, and of fewer of them."""
    import transformers

    for kind in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor"):
        try:
            processor = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust
            )
        except Exception:  # not what lies there, or a package is missing
            continue
        made = list(_run_processor(processor))
        yield from made
        if made:
            return


def _run_processor(processor: Any) -> Iterator[Mapping[str, Any]]:
    takes = inspect.signature(type(processor).__call__).parameters
    usual = {"text": _text(processor), "images": plain_image(), **dict.fromkeys(("audio", "raw_speech"), _sound())}
    there = {name: value for name, value in usual.items() if name in takes and _has(processor, name)}
    for count in range(len(there), 0, -1):
        for names in itertools.combinations(there, count):
            with contextlib.suppress(Exception):  # it may not take these together
                values = dict(processor(**{name: there[name] for name in names}, return_tensors="pt"))
                if values:
                    yield values


def _has(processor: Any, name: str) -> bool:
    """Whether what is made of several parts has the one for this argument."""
    part = {"text": "tokenizer", "images": "image_processor", "audio": "feature_extractor"}.get(name, "")
    return not hasattr(processor, "attributes") or not part or hasattr(processor, part)


def _text(processor: Any) -> str:
    """A few words, after what stands for an image where the processor has a token for that."""
    tokens = [getattr(processor, name, None) for name in ("image_token", "audio_token")]
    return " ".join([*(token for token in tokens if isinstance(token, str)), PROMPT])


def plain_image(side: int = _SIDE) -> Any:
    """A picture of so many pixels a side."""
    from PIL import Image

    ramp = torch.arange(side * side * 3).remainder(251).to(torch.uint8)
    return Image.fromarray(ramp.reshape(side, side, 3).numpy())


def _sound() -> Any:
    return torch.sin(torch.arange(_SOUND) / 10).numpy()
