"""What is known of a model before anything is tried: its signature, and the numbers in its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_MOST_NESTED = 4


@dataclass(frozen=True)
class Facts:
    """Of one model.

    Attributes:
        library: ``diffusers`` or ``transformers``.
        class_name: of the model.
        parameters: of its forward, without ``self`` and what collects the rest.
        main: what its class calls its main inputs.
        values: of its config and of the configs inside it: (way to it, key, value), the outer ones first.
    """

    library: str
    class_name: str
    parameters: Mapping[str, inspect.Parameter]
    main: tuple[str, ...]
    values: tuple[tuple[str, str, Any], ...]
    vocabulary: int

    def find(self, *keys: str, near: str = "") -> Any:
        """The config's value of the first of these keys that it has; ``near``: part of the name of an inner config."""
        for part in dict.fromkeys((near, "")):
            for key in keys:
                for where, name, value in self.values:
                    if name == key and part in where and value is not None:
                        return value
        return None

    def number(self, *keys: str, near: str = "", default: int = 0) -> int:
        """As :meth:`find`, a single positive number; of several the first."""
        for key in keys:
            value = self.find(key, near=near)
            while isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, dict):
                value = next((value[key] for key in ("height", "shortest_edge") if key in value), None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return default

    @property
    def special(self) -> tuple[int, ...]:
        """Token ids that mean something: the end, padding, the place of an image."""
        ids = []
        for _, key, value in self.values:
            if key.endswith(("token_id", "token_index", "token_ids")):
                ids += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
        return tuple(sorted(set(ids)))


def read_facts(model: Any) -> Facts:
    """Look at a model; nothing is run."""
    signature = inspect.signature(model.forward)
    spread = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    main = getattr(model, "main_input_name", ()) or ()
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    named: list[tuple[str, str, Any]] = [("", key, getattr(model, key, None)) for key in _RATIOS]
    named += [(("", key, getattr(model.config, key, None))) for key in _ALIASES if key not in config]
    return Facts(
        library="transformers" if hasattr(model, "main_input_name") else "diffusers",
        class_name=type(model).__name__,
        parameters={name: p for name, p in signature.parameters.items() if p.kind not in spread},
        main=(main,) if isinstance(main, str) else tuple(main),
        values=(*_flat(config, ""), *(item for item in named if item[2] is not None)),
        vocabulary=_vocabulary(model),
    )


# what an autoencoder of diffusers works out for itself
_RATIOS = ("spatial_compression_ratio", "temporal_compression_ratio")

# names that transformers' configs give to numbers which they call otherwise in the file (attribute_map)
_ALIASES = ("hidden_size", "vocab_size", "num_channels", "image_size")


def _flat(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, Any]]:
    inner = []
    for key, value in config.items():
        if isinstance(value, dict) and where.count(".") < _MOST_NESTED:
            inner.append((key, value))
        yield where, str(key), value
    for key, value in inner:
        yield from _flat(value, f"{where}.{key}")


def _vocabulary(model: Any) -> int:
    """Rows of the table of input embeddings; what the config says where the class does not tell."""
    try:
        table = model.get_input_embeddings()
    except Exception:
        table = None
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    if hasattr(table, "weight") and table.weight.dim() == 2:
        return int(table.weight.shape[0])
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else 16
