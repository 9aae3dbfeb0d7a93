"""The ten families of the table: small checkpoints, and wider ones for schemes that want many rows or columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from helpers import tiny

DIFFUSERS = ("cogvideox", "flux", "pixart", "sd3", "wan")
TRANSFORMERS = ("llama-tied", "mixtral", "t5", "opt", "bert")
FAMILIES = (*DIFFUSERS, *TRANSFORMERS)
WIDE = 128  # of the wider ones: in_features and most out_features are multiples of it


def _bert(folder: Path) -> None:
    """The first two layers and sixty-four tokens of the real MiniLM: trained weights, but few."""
    whole = folder.with_name("minilm")
    tiny.bert(whole)
    model = tiny.transformers.BertModel.from_pretrained(whole, num_hidden_layers=2)
    model.resize_token_embeddings(64)
    model.save_pretrained(folder)


def _cogvideox(folder: Path) -> None:
    """The demo's pipeline with a quarter of its transformer: one layer of two heads."""
    tiny.cogvideox_pipeline(folder)
    _rebuild(folder / "transformer", folder / "transformer", {"num_layers": 1, "num_attention_heads": 2})


def _rebuild(source: Path, folder: Path, changes: dict[str, Any]) -> None:
    """A model of the same class, from the config of ``source`` with other numbers, in bfloat16."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | changes
    if "_class_name" in config:
        model = getattr(tiny.diffusers, config["_class_name"]).from_config(config)
    else:
        kind = tiny.transformers.AutoConfig.for_model(**config)
        model = getattr(tiny.transformers, config["architectures"][0])(kind)
    model.bfloat16().save_pretrained(folder)


_BUILDERS: dict[str, Callable[[Path], None]] = {"bert": _bert, "cogvideox": _cogvideox}

_WIDER: dict[str, dict[str, Any]] = {
    "cogvideox": {"num_attention_heads": 4},
    "flux": {"num_attention_heads": 4},
    "pixart": {"num_attention_heads": 4, "cross_attention_dim": WIDE, "num_layers": 1},
    "sd3": {"num_attention_heads": 4, "caption_projection_dim": WIDE, "num_layers": 1},
    "wan": {"num_attention_heads": 4, "ffn_dim": 2 * WIDE, "num_layers": 1},
    "llama-tied": {"hidden_size": WIDE, "intermediate_size": 2 * WIDE, "num_hidden_layers": 1},
    "mixtral": {"hidden_size": WIDE, "intermediate_size": WIDE, "num_hidden_layers": 1},
    "t5": {"d_model": WIDE, "d_kv": 32, "d_ff": 2 * WIDE, "num_layers": 1},
    "opt": {"hidden_size": WIDE, "word_embed_proj_dim": WIDE, "ffn_dim": 2 * WIDE, "num_hidden_layers": 1},
}


@dataclass
class Checkpoints:
    """The sources and, loaded by their libraries, the models; each is made once."""

    root: Path
    _sources: dict[tuple[str, bool], Path] = field(default_factory=dict)
    _models: dict[tuple[str, bool], torch.nn.Module] = field(default_factory=dict)

    def family(self, name: str, wide: bool) -> tiny.Family:
        """How the family's source is opened; a wide one of diffusers is the denoiser alone."""
        found = tiny.FAMILIES[name]
        if not wide or found.library != "diffusers":
            return found
        config = json.loads((self.source(name, wide) / "config.json").read_text(encoding="utf-8"))
        return replace(found, component="", opener=config["_class_name"])

    def source(self, name: str, wide: bool) -> Path:
        """The family's checkpoint. Do not write to it."""
        key = (name, wide and name in _WIDER)
        if key not in self._sources:
            folder = self.root / "-".join([name, *["wide"] * key[1]])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                if key[1]:
                    _rebuild(self.source(name, False) / tiny.FAMILIES[name].component, folder, _WIDER[name])
                else:
                    _BUILDERS.get(name, tiny.FAMILIES[name].build)(folder)
            self._sources[key] = folder
        return self._sources[key]

    def model(self, name: str, wide: bool) -> torch.nn.Module:
        """The unquantized model that is to be quantized, in bfloat16. Do not change it."""
        key = (name, wide and name in _WIDER)
        if key not in self._models:
            family, source = self.family(name, wide), self.source(name, wide)
            if family.library == "diffusers":
                self._models[key] = tiny.diffusers.AutoModel.from_pretrained(
                    str(source), subfolder=family.component or None, torch_dtype=torch.bfloat16
                )
            else:
                opener = getattr(tiny.transformers, family.opener)
                self._models[key] = opener.from_pretrained(source, dtype=torch.bfloat16)
        return self._models[key]
