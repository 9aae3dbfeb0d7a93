"""Small checkpoints of classes that tie tensors, and whether a plan has what the library has when it opens one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import aoconvert
from aoconvert.formats.registry import open_reader
from aoconvert.planning.types import ComponentPlan
from helpers import tiny

T: Any = tiny.transformers
State = dict[str, torch.Tensor]
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
_LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
_BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
_BART |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_OPT |= {"max_position_embeddings": 32, "word_embed_proj_dim": 32}


def _gemma3() -> Any:
    text = {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return T.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )


MODELS: Mapping[str, Callable[[], Any]] = {
    "T5ForConditionalGeneration": lambda: T.T5Config(**_T5),
    "T5ForConditionalGeneration v1.1": lambda: T.T5Config(
        **_T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"
    ),
    "MT5ForConditionalGeneration": lambda: T.MT5Config(**_T5, tie_word_embeddings=False),
    "UMT5ForConditionalGeneration": lambda: T.UMT5Config(**_T5, tie_word_embeddings=False),
    "UMT5EncoderModel": lambda: T.UMT5Config(**_T5),
    "BartForConditionalGeneration": lambda: T.BartConfig(**_BART),
    "OPTForCausalLM": lambda: T.OPTConfig(**_OPT),
    "GPTNeoForCausalLM": lambda: T.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]
    ),
    "LlamaForCausalLM": lambda: T.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "BertForMaskedLM": lambda: T.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ),
    "Gemma3ForConditionalGeneration": _gemma3,
    "MarianMTModel": lambda: T.MarianConfig(**_BART, max_position_embeddings=16, pad_token_id=0),
}


def build(name: str, **extra: State) -> tuple[Any, State, Any]:
    """The class, a model's tensors under all its names, each its own, and its config."""
    cls = getattr(T, name.split()[0])
    config = MODELS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).bfloat16()
    config.architectures = [cls.__name__]
    return cls, {key: value.clone() for key, value in model.state_dict().items()}, config


def save(folder: Path, config: Any, state: State) -> Path:
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def planned(folder: Path, **options: Any) -> ComponentPlan:
    made = aoconvert.plan(folder, "int8wo", output=folder.parent / "out", device="cpu", min_quantized=0.0, **options)
    [component] = made.components
    return component


def assert_as_library(folder: Path, cls: Any, **options: Any) -> ComponentPlan:
    """Every parameter and buffer of the opened model is the one that the plan reads, and the same ones are tied."""
    model, report = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    plan = planned(folder, **options)
    names = {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)}
    wanted = model.state_dict()
    ties = {spec.name: spec.tied_to for spec in plan.skeleton if spec.tied_to}
    written = {tensor.name: tensor for tensor in plan.tensors if tensor.action != "tied"}
    left = {item.name for item in plan.missing}
    assert {tensor.name for tensor in plan.tensors if tensor.action != "carry"} | left == set(wanted)
    for name, value in wanted.items():
        if name in left:
            continue
        place = ties.get(name, name)
        assert names.get(name) == names.get(place)
        tensor = written[place]
        assert tensor.origin is not None
        reader = open_reader(folder / tensor.origin[0])
        assert torch.equal(reader.read(tensor.origin[1]).to(value.dtype), value), name
        reader.close()
    apart = [name for name in written if name in names]
    assert len({names[name] for name in apart}) == len(apart)
    assert report["missing_keys"] <= left
    return plan


def differ(state: State, *names: str) -> State:
    """The same checkpoint, in which these tensors differ from each other."""
    return {key: value + (1 + names.index(key)) if key in names else value for key, value in state.items()}


UNKNOWN: State = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.embeddings.position_ids": torch.arange(4),
    "mtp.layers.0.weight": torch.ones(4, 4, dtype=torch.bfloat16),
    "model.layers.0.self_attn._extra_state": torch.zeros(3, dtype=torch.uint8),
    "spectrum": torch.ones(2, dtype=torch.complex64),
}
