"""What the golden conversions are made from: tiny checkpoints, with the same bytes in every process and on every CPU.

The libraries build the models; then every weight gets values by integer arithmetic alone, because torch's own normal
numbers differ in their last bits between CPUs with and without AVX2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from helpers import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_WEIGHTS, _SHARD = "model.safetensors", "{stem}-{number:05d}-of-00002{suffix}"


def _values(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Bell-shaped values between -0.125 and 0.125: sums of four integers, scaled by a power of two."""
    total = torch.zeros(shape, dtype=torch.int32)
    for _ in range(4):
        total += torch.randint(-64, 65, shape, dtype=torch.int32, generator=generator)
    return (total.float() / 2048).to(dtype)


def _refill(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = dict(sorted(load_file(path).items()))
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = _values(tensor.shape, tensor.dtype, generator)
        save_file(tensors, path, metadata)


def _family(name: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        tiny.FAMILIES[name].build(folder)
        _refill(folder)

    return build


def _save(model: Any, folder: Path) -> None:
    model.bfloat16().save_pretrained(folder)
    _refill(folder)


def _llama(folder: Path, **changes: Any) -> None:
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}
    _save(tiny.transformers.LlamaForCausalLM(tiny.transformers.LlamaConfig(**config)), folder)


def _wide(folder: Path) -> None:
    """In and out features that are multiples of 128, for schemes with large blocks."""
    _llama(folder, vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1)


def _large(folder: Path) -> None:
    """A table of 269 MB: it is read in slices, and its int8 is too large to be put together in memory."""
    _llama(folder, vocab_size=524_800, hidden_size=256, num_hidden_layers=1)
    tensors = load_file(folder / _WEIGHTS)
    row = torch.arange(tensors["lm_head.weight"].numel() // 4, dtype=torch.int32) % 509 - 254
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = (row.float() / 2048).bfloat16().repeat(4).reshape(tensors[name].shape)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
    _change_config(folder, tie_word_embeddings=True)


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes, indent=2), encoding="utf-8")


def _take(folder: Path) -> Tensors:
    """The weights of a Llama that is built there, whose file is gone."""
    _llama(folder)
    tensors = load_file(folder / _WEIGHTS)
    (folder / _WEIGHTS).unlink()
    return dict(sorted(tensors.items()))


def _bin(folder: Path) -> None:
    torch.save(_take(folder), folder / "pytorch_model.bin")


def _bin_shards(folder: Path) -> None:
    _shards(folder, _take(folder), "pytorch_model", ".bin", torch.save)


def _safetensors_shards(folder: Path) -> None:
    _shards(folder, _take(folder), "model", ".safetensors", lambda part, path: save_file(part, path, {"format": "pt"}))


def _shards(folder: Path, tensors: Tensors, stem: str, suffix: str, save: Callable[[Tensors, Path], None]) -> None:
    """Every other tensor in the second of two files."""
    names, files = list(tensors), {}
    for number in (1, 2):
        path = _SHARD.format(stem=stem, number=number, suffix=suffix)
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        save(part, folder / path)
        files |= dict.fromkeys(part, path)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _unknown(folder: Path) -> None:
    """Tensors that the class does not know, of dtypes that a model seldom has."""
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.embeddings.position_ids": torch.arange(4),
        "mtp.layers.0.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "model.layers.0.self_attn._extra_state": torch.zeros(3, dtype=torch.uint8),
    }
    save_file(_take(folder) | extra, folder / _WEIGHTS, {"format": "pt"})


def _prediction(folder: Path) -> None:
    """A layer for multi-token prediction, with experts, under the name that the class ignores."""
    config = tiny.transformers.Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    )
    _save(tiny.transformers.Glm4MoeForCausalLM(config), folder)
    tensors = load_file(folder / _WEIGHTS)
    layer = {key.replace(".1.", ".46.", 1): value.clone() for key, value in tensors.items() if ".layers.1." in key}
    extra = {"model.layers.46.eh_proj.weight": torch.ones(32, 64).bfloat16()}
    save_file(tensors | layer | extra, folder / _WEIGHTS, {"format": "pt"})


def _without_a_norm(folder: Path) -> None:
    tensors = _take(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})


SOURCES: Mapping[str, Callable[[Path], None]] = {
    **{name: _family(name) for name in ("cogvideox", "flux", "pixart", "sd3", "wan", "mixtral", "opt", "t5")},
    "llama": _llama,
    "llama-tied": lambda folder: _llama(folder, tie_word_embeddings=True),
    "llama-wide": _wide,
    "llama-large": _large,
    "llama-bin": _bin,
    "llama-bin-shards": _bin_shards,
    "llama-shards": _safetensors_shards,
    "llama-unknown": _unknown,
    "llama-without-a-norm": _without_a_norm,
    "glm-prediction": _prediction,
}
