"""Small real checkpoints for the tests of plan, command line and manifest."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CogVideoX pipeline of real classes; never written to."""
    from aoconvert.demo import build_pipeline

    folder = tmp_path_factory.mktemp("cogvideox") / "tiny-cogvideox"
    build_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an output head of its own; never written to."""
    return build_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")


def write_config(folder: Path, values: Mapping[str, Any], name: str = "config.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values, indent=2))


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of a Llama's tensors, from the architecture's definition alone."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (kv, hidden),
            f"{at}self_attn.v_proj.weight": (kv, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def llama_tensors(config: Mapping[str, Any] = LLAMA) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights, always the same."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).mul(0.1).to(torch.bfloat16)
        for name, shape in llama_shapes(config).items()
    }


def build_llama(folder: Path, *, tensors: Mapping[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A transformers checkpoint in one safetensors file, with the small files that lie around on the Hub."""
    config = {**LLAMA, **changes}
    write_config(folder, config)
    save_file(dict(tensors if tensors is not None else llama_tensors(config)), folder / "model.safetensors")
    (folder / "generation_config.json").write_text("{}")
    return folder


def build_sparse_llama(folder: Path, config: Mapping[str, Any]) -> Path:
    """A Llama whose weights are all zero, in a sparse file: it looks as large as it should, and takes no disk."""
    write_config(folder, config)
    entries, offset = {}, 0
    for name, shape in llama_shapes(config).items():
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with weights.open("r+b") as file:
        file.truncate(8 + len(raw) + offset)
    return folder


def shard(folder: Path, stem: str, count: int = 2, variant: str | None = None) -> None:
    """Split ``<stem>.safetensors`` into shards with an index."""
    whole = folder / f"{stem}.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    middle = f".{variant}" if variant else ""
    weight_map = {}
    for number in range(count):
        path = f"{stem}{middle}-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / path)
        weight_map |= dict.fromkeys(part, path)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    name = f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    (folder / name).write_text(json.dumps(index))
