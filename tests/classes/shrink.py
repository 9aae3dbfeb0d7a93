"""Make a class's model small: ``python tests/classes/shrink.py`` writes ``configs.json``, from default configs.

Every number of a default config that says how large something is gets a small value, all at once; where the class then
cannot be built, or takes no input any more, the changes are halved until those are found that it takes
(delta debugging). What no rule can serve is in ``overrides.json``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import tiny
from torch import nn

from aoconvert.inputs import NoInputs, find_inputs

Changes = dict[str, Any]  # "vision_config.hidden_size" -> 32

CONFIGS = Path(__file__).with_name("configs.json")
OVERRIDES = Path(__file__).with_name("overrides.json")
_SMALL = 5_000_000  # parameters of a model that is quickly filled
_CHECKS, _SECONDS = 60, 60.0  # of one class

_ID = 100  # token ids that the small vocabulary does not have are put here and behind
_VOCABULARY = 120

# the first that fits: fields by their last name, and what a number there becomes
_RULES: tuple[tuple[str, Any], ...] = (
    (r".*_token_(id|index)s?|.*_start_id|.*_end_id", _ID),
    (r".*experts_per_tok.*|.*top_?k|moe_k|num_experts_per_.*", 2),
    (r"n_group|topk_group|num_expert_group|n_groups", 1),
    (r"rotary_dim|.*rope_head_dim|.*nope_head_dim|.*rope_dim", 8),
    (
        r".*(token|token_id|token_index|_id|_ids|idx|index|label|ratio|eps|std|factor|theta|base|window|scale|version)s?",
        None,
    ),
    (r"(\w+_)?(in|num|latent|input)_channels|out_channels|in_chans", None),
    (r".*(stride|kernel|padding|dilation|frames|patch_size|patch_size_t|tubelet|buckets|groups?|out_features)s?", None),
    (r"(sampling|frame|sample)_rate|n_fft|hop_length|num_train_timesteps|.*_channels_per_.*|.*dropout.*", None),
    (
        r".*(num|n)_?(hidden|encoder|decoder|text|single|dual|refiner|attention|entity|.*)_?layers?|layers|depths?|.*_layers",
        2,
    ),
    (r".*(num_blocks|n_blocks|layers_per_block|num_res_blocks|n_layer|num_.*_blocks)", 2),
    (r"num_key_value_heads|.*kv_heads|num_key_value_groups", 2),
    (r".*heads?|n_head|.*_head_count", 4),
    (r".*head_dim|d_kv|d_head|.*head_size", 8),
    (r".*vocab_size.*", _VOCABULARY),
    (r".*experts|num_local_experts|n_routed_experts", 4),
    (r".*(max_position|max_seq|n_positions|max_source|max_target|max_text|max_len).*", 64),
    (r".*(image_size|img_size|input_size|sample_size|sample_height|sample_width|resolution)", 32),
    (r".*(intermediate|ffn|ff_dim|d_ff|mlp_dim|ffw).*", 64),
    (r".*(cross_attention_norm|norm_num_groups|num_groups)", 4),
    (r".*", 32),
)
_LARGE = 48  # other numbers below it are no sizes


def changes_of(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """A small value for each field that says how large something is."""
    for name, value in config.items():
        path = f"{where}{name}"
        if not isinstance(name, str) or name in ("id2label", "label2id", "task_specific_params"):
            continue
        if isinstance(value, Mapping):
            yield from changes_of(value, f"{path}.")
            continue
        small = next(small for pattern, small in _RULES if re.fullmatch(pattern, name))
        if small is None or isinstance(value, (bool, str)) or value is None:
            continue
        new = _smaller(value, small, axes=name.startswith(("axes_dim", "rope_axes_dim")))
        if new != value:
            yield path, new


def unset_sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """A value for each size that a class of diffusers or a config leaves open, and may not be able to do without."""
    for name, value in config.items():
        small = next(small for pattern, small in _RULES if re.fullmatch(pattern, name))
        if value is None and re.fullmatch(r"(in|out)_channels|vocab_size|.*_heads|.*head_dim|.*_dim|sample_size", name):
            yield name, 4 if small is None else small


def _smaller(value: Any, small: int, axes: bool = False) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if small == _ID:
            return _ID + value % (_VOCABULARY - _ID) if value >= _VOCABULARY else value
        return small if value > small and (value >= _LARGE or small < 32) else value
    if isinstance(value, (list, tuple)) and value and axes:  # of a rotary embedding: they add up to the width of a head
        return type(value)([2] * (len(value) - 1) + [max(2, 8 - 2 * (len(value) - 1))])
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, list, tuple)) for item in value):
        return type(value)(_smaller(item, small) for item in value)
    return value


def class_of(library: str, name: str) -> Any:
    return getattr(tiny.diffusers if library == "diffusers" else tiny.transformers, name)


def default_config(library: str, name: str, changes: Changes) -> dict[str, Any]:
    """The fields that the class gives values to, those of inner configs nested."""
    cls = class_of(library, name)
    if library == "diffusers":
        fields = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in fields if p.default is not p.empty and p.name not in ("self", "kwargs")}
    return make_config(cls.config_class, changes).to_dict()


def make_config(kind: Any, changes: Changes) -> Any:
    return kind(**_nested(changes, kind))


def _nested(changes: Changes, kind: Any) -> dict[str, Any]:
    """The changes as the config class takes them; an inner config also needs to know what it is."""
    found: dict[str, Any] = {}
    for path, value in changes.items():
        *outer, name = path.split(".")
        place = found
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = value
    if kind is not None and any(isinstance(value, dict) for value in found.values()):
        try:
            usual = kind().to_dict()
        except Exception:
            usual = {}
        _name_types(found, usual)
    return found


def _name_types(found: dict[str, Any], usual: Mapping[str, Any]) -> None:
    for name, value in found.items():
        default = usual.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            if default.get("model_type"):
                value.setdefault("model_type", default["model_type"])
            _name_types(value, default)


def build(library: str, name: str, changes: Changes, device: str = "cpu") -> nn.Module:
    """The model in float32."""
    cls = class_of(library, name)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        if library == "diffusers":
            model = cls(**_nested(changes, None))
        else:
            model = cls._from_config(make_config(cls.config_class, changes), dtype=torch.float32)
    return model.eval()


class Shrinking:
    """The search for the changes that a class takes."""

    def __init__(self, library: str, name: str, fixed: Changes) -> None:
        self.library, self.name, self.fixed = library, name, fixed
        self.accepted: Changes = {}
        self.left, self.until = _CHECKS, time.monotonic() + _SECONDS
        self.runs = True

    def run(self) -> Changes:
        config = default_config(self.library, self.name, self.fixed)
        items = {path: value for path, value in changes_of(config) if path not in self.fixed}
        unset = dict(unset_sizes(config))
        if not self.works({}, forward=False) and self.works(unset, forward=False):
            self.fixed = {**unset, **self.fixed}
        self.runs = self.works(items, forward=True) or self.works({}, forward=True)
        self.go(items)
        return {**self.accepted, **self.fixed}

    def go(self, items: Changes) -> None:
        if not items or self.left <= 0 or time.monotonic() > self.until:
            return
        if self.works({**self.accepted, **items}, forward=self.runs):
            self.accepted |= items
        elif len(items) > 1:
            names = list(items)
            for part in (names[: len(names) // 2], names[len(names) // 2 :]):
                self.go({name: items[name] for name in part})

    def works(self, changes: Changes, *, forward: bool) -> bool:
        self.left -= 1
        try:
            model = build(self.library, self.name, {**changes, **self.fixed}, "meta")
            unsure = forward and find_inputs(model, tries=120, seconds=6).proof == "nothing"
            if unsure and sum(parameter.numel() for parameter in model.parameters()) < _SMALL:  # it needs values
                find_inputs(build(self.library, self.name, {**changes, **self.fixed}), tries=120, seconds=6)
        except NoInputs:
            return False
        except Exception:  # whatever a class raises for a config that does not fit
            return False
        return True


def overrides() -> dict[str, Changes]:
    return json.loads(OVERRIDES.read_text(encoding="utf-8"))["classes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="the file to add to")
    parser.add_argument("classes", nargs="*", help="LIBRARY:CLASS; by default every class in configs.json")
    arguments = parser.parse_args()
    known = json.loads(arguments.configs.read_text(encoding="utf-8")) if arguments.configs.is_file() else {}
    fixed = overrides()
    tiny.diffusers.utils.logging.set_verbosity_error()
    tiny.transformers.utils.logging.set_verbosity_error()
    for title in arguments.classes or list(known):
        library, _, name = title.partition(":")
        began = time.monotonic()
        try:
            shrinking = Shrinking(library, name, fixed.get(name, {}))
            changes = shrinking.run()
            model = build(library, name, changes, "meta")
        except Exception as error:
            print(f"{title}: {type(error).__name__}: {error}".splitlines()[0][:200], flush=True)
            continue
        count = sum(parameter.numel() for parameter in model.parameters())
        known[title] = changes
        print(
            f"{title}: {count / 1e6:.2f} M, {'runs' if shrinking.runs else 'NO FORWARD'}, {_CHECKS - shrinking.left}"
            f" checks, {time.monotonic() - began:.1f} s",
            flush=True,
        )
        lines = [f"{json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known)]
        arguments.configs.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
