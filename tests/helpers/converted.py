"""Tiny models of architectures whose checkpoints transformers converts while it loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from helpers import tiny  # noqa: F401  (its imports come first)

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_ENCODER = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}
_MLA = {**_TEXT, "num_key_value_heads": 4}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _deepseek_v3() -> Any:
    return transformers.DeepseekV3Config(
        **_MLA,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )


def _qwen3_vl_moe() -> Any:
    # the experts' down_proj is square: only its transposition tells old checkpoints from new ones
    text = {**_TEXT, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8}
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)


def _ernie() -> Any:
    text = {
        **_TEXT,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [16, 8],
        "head_dim": 128,
        "pad_token_id": 0,
    }
    text["mlp_layer_types"] = ["dense", "sparse"]
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32}
    return transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)


def _qwen4() -> Any:
    """An embedding of n-grams in twelve parts, beside experts."""
    return transformers.Qwen4ExpTextConfig(
        **_TEXT,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        head_dim=8,
        ple_layer_ids=[1],
        heads_per_ngram=2,
        ngram_vocab_size_base=40,
        make_ngram_vocab_size_divisible_by=12,
        split_ngram_parts=12,
        hc_lowrank=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        eos_token_id=2,
    )


# class, config, how many of its tensors are made, by what happens to their rows
MODELS: Mapping[str, tuple[str, Callable[[], Any], Mapping[str | None, int]]] = {
    "mixtral": (
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(**_TEXT, num_local_experts=12),
        {"stacked": 4},
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        lambda: transformers.Qwen2MoeConfig(
            **_TEXT, num_experts=12, moe_intermediate_size=16, shared_expert_intermediate_size=32
        ),
        {"stacked": 4},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(**_TEXT, num_experts=12, moe_intermediate_size=16, head_dim=8),
        {"stacked": 4},
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        lambda: transformers.OlmoeConfig(**_TEXT, num_experts=4, num_experts_per_tok=2),
        {"stacked": 4},
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", _deepseek_v3, {"stacked": 2}),
    "phimoe": ("PhimoeForCausalLM", lambda: transformers.PhimoeConfig(**_TEXT, num_local_experts=4), {"stacked": 4}),
    "gpt-oss": ("GptOssForCausalLM", lambda: transformers.GptOssConfig(**_TEXT, num_local_experts=4, head_dim=8), {}),
    "llama4": (
        "Llama4ForCausalLM",
        lambda: transformers.Llama4TextConfig(**_TEXT, num_local_experts=4, head_dim=8, intermediate_size_mlp=32),
        {},
    ),
    "qwen4": ("Qwen4ExpForCausalLM", _qwen4, {"stacked": 4, "concatenated": 1}),
    "olmo-hybrid": (
        "OlmoHybridForCausalLM",
        lambda: transformers.OlmoHybridConfig(**{**_TEXT, "num_hidden_layers": 4}, **_IDS),
        {"concatenated": 3},
    ),
    "qwen3-vl-moe": ("Qwen3VLMoeForConditionalGeneration", _qwen3_vl_moe, {"mapped": 4}),
    "ernie-vl-moe": ("Ernie4_5_VLMoeForConditionalGeneration", _ernie, {None: 8}),
    "gte": ("GteModel", lambda: transformers.GteConfig(**_ENCODER), {None: 16}),
    "nomic-bert": ("NomicBertModel", lambda: transformers.NomicBertConfig(**_ENCODER), {None: 6}),
    "dinov2": (
        "Dinov2Model",
        lambda: transformers.Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_swiglu_ffn=True,
            image_size=28,
            patch_size=14,
        ),
        {None: 8},
    ),
}


def build(name: str, folder: Path) -> None:
    """Random weights in bfloat16, in many small files, under the names that the checkpoints of that model have."""
    class_name, config, _ = MODELS[name]
    model = getattr(transformers, class_name)(config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.bfloat16().save_pretrained(folder, max_shard_size="40KB")
