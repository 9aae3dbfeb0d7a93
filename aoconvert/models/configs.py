"""A transformers model's config, as the library's own config class reads it from a ``config.json``.

Nothing here knows what is in one: names that changed, values that JSON has no word for (``{"__float__": "Infinity"}``),
a text model's part of a whole CLIP config are for that class to understand.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from aoconvert.models.base import ModelPart

FILE = "config.json"

# These say which other files the library reads in place of the usual ones. What is written has the usual ones.
REDIRECTIONS = ("configuration_files", "transformers_weights")

_QUANTIZATION = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"


@contextmanager
def write_folder(config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that holds nothing but this config."""
    with tempfile.TemporaryDirectory(prefix="aoconvert-") as place:
        folder = Path(place)
        (folder / FILE).write_text(json.dumps(without_redirections(config)), encoding="utf-8")
        yield folder


def without_redirections(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the keys that lead to other files."""
    return {key: value for key, value in config.items() if key not in REDIRECTIONS}


def read(config: Mapping[str, Any], config_class: Any) -> Any:
    """The config object, as ``from_pretrained`` of a model makes it.

    Args:
        config: what the file holds.
        config_class: a ``PreTrainedConfig``, or ``AutoConfig``.

    Raises:
        Exception: of whatever kind the class raises.
    """
    with write_folder(config) as folder:
        return config_class.from_pretrained(folder, local_files_only=True)


def own(component: ModelPart, config_class: Any) -> ModelPart:
    """The component with a config that the class reads as a whole.

    A class that is a part of another model (``CLIPTextModel``) takes its part out of that model's config, and does not
    see a ``quantization_config`` beside it. Then the config is what the class itself saves.

    Raises:
        Exception: as :func:`read`.
    """
    probe = read({**component.config, _QUANTIZATION: {"quant_method": "torchao"}}, config_class)
    if getattr(probe, _QUANTIZATION, None) is not None:
        return component
    saved = json.loads(read(component.config, config_class).to_json_string())
    return replace(component, config={**saved, "architectures": [component.class_name]})


def with_modelopt(config: Mapping[str, Any], said: object) -> Mapping[str, Any]:
    """The config with what older exports of NVIDIA's Model Optimizer say of quantization in a file of its own.

    Args:
        config: what ``config.json`` holds.
        said: what ``hf_quant_config.json`` holds.
    """
    algorithm = said.get("quantization") if isinstance(said, dict) else None
    if config.get(_QUANTIZATION) or not isinstance(algorithm, dict) or not algorithm.get("quant_algo"):
        return config
    return {**config, _QUANTIZATION: {**algorithm, "quant_method": "modelopt"}}
