"""GGUF files of tiny real models, as llama.cpp's converter writes them: by gguf's own writer and quantizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

State = Mapping[str, torch.Tensor]
Change = Callable[[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]


def blocks(shape: tuple[int, ...], kind: Kind, seed: int) -> np.ndarray[Any, Any]:
    """Blocks of any codes, with scales that are numbers: gguf itself only dequantizes K-quants."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    made = generator.integers(0, 256, (int(np.prod(shape)) // elements, nbytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for at in {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q6_K: (208,)}.get(kind, (0, 2)):
        made[:, at : at + 2] = scale
    return made.reshape(*shape[:-1], shape[-1] // elements * nbytes)


def write(
    path: Path, architecture: str, values: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray[Any, Any], Kind]]
) -> Path:
    """Write a file of values (float32; blocks where they are bytes) in the types that are asked for."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        name = key if "." in key else f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_array(name, value)
    for name, (array, kind) in tensors.items():
        stored = array if array.dtype == np.uint8 else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The order of rows in which llama.cpp wants a Llama's queries and keys."""
    half = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return half.swapaxes(1, 2).reshape(weight.shape)


def _separate(state: State) -> dict[str, torch.Tensor]:
    """With the experts' gate and up apart, under the names that llama.cpp knows."""
    found = {}
    for key, tensor in state.items():
        if key.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            found |= {key.replace("gate_up_proj", "gate_proj.weight"): gate}
            found |= {key.replace("gate_up_proj", "up_proj.weight"): up}
        else:
            found[f"{key}.weight" if key.endswith("experts.down_proj") else key] = tensor
    return found


def as_stored(
    model: Any,
    architecture: gguf.MODEL_ARCH,
    kind: Callable[[str, tuple[int, ...]], Kind],
    change: Change | None = None,
) -> dict[str, tuple[np.ndarray[Any, Any], Kind]]:
    """A model's tensors under llama.cpp's names.

    Args:
        model: of transformers.
        architecture: gguf's.
        kind: which type a tensor has.
        change: what llama.cpp does to a tensor of that name.
    """
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found = {}
    for key, tensor in _separate(model.state_dict()).items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            continue
        array = tensor.float().numpy()
        array = np.ascontiguousarray(change(name, array) if change is not None else array, dtype=np.float32)
        chosen = kind(name, array.shape)
        random = chosen.name.endswith("_K")
        found[name] = (blocks(array.shape, chosen, len(found)) if random else array, chosen)
    return found


TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab", *(f"<{number}>" for number in range(5, 128))],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.bos_token_id": 0,
}


_MIXED = {
    "attn_q": Kind.Q8_0,
    "attn_k": Kind.Q4_0,
    "attn_v": Kind.Q6_K,
    "attn_output": Kind.BF16,
    "ffn_up": Kind.Q4_K,
    "ffn_down": Kind.Q5_0,
    "ffn_gate_inp": Kind.F32,
    "ffn_gate": Kind.Q5_1,
    "token_embd": Kind.F16,
}


def mixed(name: str, shape: tuple[int, ...]) -> Kind:
    """Types as a published file mixes them: vectors are never in blocks."""
    if len(shape) == 1:
        return Kind.F32
    return next((kind for part, kind in _MIXED.items() if part in name), Kind.Q4_1)


def uniform(chosen: Kind) -> Callable[[str, tuple[int, ...]], Kind]:
    """One type for all matrices."""
    return lambda _name, shape: Kind.F32 if len(shape) == 1 else chosen


def _llama_rows(model: Any) -> Change:
    heads = {".attn_q.": model.config.num_attention_heads, ".attn_k.": model.config.num_key_value_heads}
    return lambda name, array: next((permute(array, heads[part]) for part in heads if part in name), array)


def _norms(_model: Any) -> Change:
    return lambda name, array: array + 1 if name.endswith("norm.weight") else array


def _gpt2(_model: Any) -> Change:
    layers = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")
    return lambda name, array: array.T if name.endswith(layers) else array


_SIZES = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_VALUES = {
    "context_length": 64,
    "embedding_length": 256,
    "block_count": 2,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
}
# transformers takes 768 for any file, and 1024 positions for any GPT-2
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
_OWN: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], Callable[[Any], Change] | None]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}, {}, _llama_rows),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, {}, None),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"head_dim": 64, "tie_word_embeddings": True},
        {"attention.key_length": 64, "attention.sliding_window": 64},
        _norms,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "n_positions": 1024,
            "vocab_size": 128,
            "n_embd": 256,
            "n_layer": 2,
            "n_head": 4,
            "tie_word_embeddings": False,
        },
        {"attention.layer_norm_epsilon": 1e-5},
        _gpt2,
    ),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 64, "tie_word_embeddings": False, **_EXPERTS},
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 768, "attention.key_length": 64},
        None,
    ),
}
LANGUAGE_MODELS = tuple(_OWN)
_ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}


def language_model(
    folder: Path, name: str = "llama", kind: Callable[[str, tuple[int, ...]], Kind] = mixed, **values: Any
) -> Path:
    """A tiny language model in ``model.gguf``.

    Args:
        folder: for the file.
        name: one of ``LANGUAGE_MODELS``.
        kind: which type a tensor has.
        values: more of the file's.
    """
    import transformers

    cls, own, more, change = _OWN[name]
    model_class = getattr(transformers, cls)
    sizes = own if name == "gpt2" else {**_SIZES, **own}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**sizes))
        for tensor in model.parameters():
            torch.nn.init.normal_(tensor, std=0.2)
    tensors = as_stored(model, _ARCHITECTURES[name], kind, change(model) if change else None)
    folder.mkdir(parents=True, exist_ok=True)
    written = {f"{name}.{key}": value for key, value in {**_VALUES, **more}.items()}
    return write(folder / "model.gguf", name, {**written, **TOKENS, **values}, tensors)
