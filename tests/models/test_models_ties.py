"""Tensors that share their memory: written once they may be quantized, and on request they are made their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny

from aoconvert import schemes
from aoconvert.models import Skeleton, build_skeleton, identify
from aoconvert.models.ties import untie
from aoconvert.schemes.apply import quantize_weight
from aoconvert.sources import resolve

T: Any = tiny.transformers
_SMALL = {"vocab_size": 64, "d_model": 32}
_T5 = {**_SMALL, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


def _seeing() -> Any:
    """A model with a nested config that also says what is tied."""
    text = {**_BERT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return T.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


MODELS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        lambda: T.LlamaConfig(**_BERT, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "opt": (
        "OPTForCausalLM",
        lambda: T.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=32,
        ),
    ),
    "bert": ("BertForMaskedLM", lambda: T.BertConfig(**_BERT, num_attention_heads=4)),
    "bart": (
        "BartForConditionalGeneration",
        lambda: T.BartConfig(**_SMALL, **_LAYERS, encoder_ffn_dim=64, decoder_ffn_dim=64),
    ),
    "gemma3": ("Gemma3ForConditionalGeneration", _seeing),
    "t5": ("T5ForConditionalGeneration", lambda: T.T5Config(**_T5)),
    "t5-encoder": ("T5EncoderModel", lambda: T.T5Config(**_T5)),
    "umt5": ("UMT5ForConditionalGeneration", lambda: T.UMT5Config(**_T5)),
    "switch": ("SwitchTransformersForConditionalGeneration", lambda: T.SwitchTransformersConfig(**_T5, num_experts=2)),
}  # fmt: skip
FREE = ("llama", "opt", "bert", "bart", "gemma3")


def saved(name: str, folder: Path) -> tuple[Any, Skeleton]:
    """The model, as it is opened again, and its skeleton."""
    class_name, config = MODELS[name]
    model = getattr(T, class_name)(config())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embed" in key or "shared" in key:  # a padding row of zeros has no scale
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.bfloat16().save_pretrained(folder)
    component = identify(resolve(str(folder))).component("")
    assert component is not None
    return getattr(T, class_name).from_pretrained(folder).eval(), build_skeleton(component, torch.bfloat16)


def forward(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 25).reshape(1, 24)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder and hasattr(model, "lm_head") else {}
    with torch.no_grad():
        output = model(input_ids=ids, **extra)
    return output.logits if "logits" in output else output.last_hidden_state


def reopened(model: Any, source: Path, output: Path, state: Mapping[str, torch.Tensor], **config: Any) -> Any:
    """What plain ``from_pretrained`` makes of a file of these tensors."""
    output.mkdir()
    torch.save(dict(state), output / "pytorch_model.bin")
    values = json.loads((source / "config.json").read_text()) | config
    values["quantization_config"] = {
        "quant_method": "torchao",
        "quant_type": {"default": schemes.get("int8wo").config_dict},
        "include_input_output_embeddings": True,
    }
    (output / "config.json").write_text(json.dumps(values))
    loaded, report = type(model).from_pretrained(output, output_loading_info=True)
    assert not any(report.values()), report
    return loaded.eval()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.float() - other.float()).norm() < 0.1 * other.float().norm())


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", "int8wo"),
        ("t5", "float8wo"),
        *(
            pytest.param(name, scheme, marks=pytest.mark.exhaustive)
            for name in ("llama", "opt", "bert", "bart", "t5", "t5-encoder")
            for scheme in ("int8wo", "float8wo", "int8wo-groups")
        ),
    ],
)
def test_a_shared_tensor_that_is_written_once_may_be_quantized(name: str, scheme: str, tmp_path: Path) -> None:
    model, skeleton = saved(name, tmp_path / "source")
    chosen = schemes.get("int8wo", group_size=16) if scheme == "int8wo-groups" else schemes.get(scheme)
    before, state = forward(model), model.state_dict()
    shared = {spec.tied_to for spec in skeleton if spec.tied_to and spec.name.endswith("weight")}
    assert len(shared) == 1
    tied = {spec.name for spec in skeleton if spec.tied_to}
    written = {
        key: quantize_weight(value, chosen) if key in shared else value
        for key, value in state.items()
        if key not in tied
    }
    loaded = reopened(model, tmp_path / "source", tmp_path / "out", written)
    kept = loaded.state_dict()
    assert {type(kept[key]).__name__ for key in (*shared, *tied) if key.endswith("weight")} == {
        chosen.entry.tensor_class.name
    }
    assert set(loaded.all_tied_weights_keys) == tied
    after = forward(loaded)
    assert not torch.equal(after, before)
    assert close(after, before)


@pytest.mark.parametrize(
    "name", [name if name in ("llama", "bert") else pytest.param(name, marks=pytest.mark.exhaustive) for name in FREE]
)
def test_untied_tensors_have_schemes_of_their_own(name: str, tmp_path: Path) -> None:
    model, skeleton = saved(name, tmp_path / "source")
    result = untie(skeleton, torch.bfloat16)
    assert not result.stuck
    assert set(result.free) == {spec.name for spec in skeleton if spec.tied_to}
    assert not any(spec.tied_to for spec in result.skeleton)
    assert {spec.name: spec.shape for spec in result.skeleton} == {spec.name: spec.shape for spec in skeleton}
    state = model.state_dict()
    before = forward(model)
    # the embeddings in int8, the head that was one with them as it is
    tables = {
        spec.name
        for spec in result.skeleton
        if spec.kind == "embedding" and spec.name in {*result.free, *result.free.values()}
    }
    written = {}
    for spec in result.skeleton:
        value = state[result.free.get(spec.name, spec.name)].clone()
        written[spec.name] = quantize_weight(value, schemes.get("int8wo")) if spec.name in tables else value
    loaded = reopened(model, tmp_path / "source", tmp_path / "out", written, **result.config)
    kept = loaded.state_dict()
    assert not loaded.all_tied_weights_keys
    assert {type(kept[key]).__name__ for key in tables} == {"Int8Tensor"}
    heads = set(result.free) - tables
    assert heads
    assert all(torch.equal(kept[key], state[key]) for key in heads)
    after = forward(loaded)
    assert not torch.equal(after, before)
    assert close(after, before)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("t5", "always ties"),
        ("t5-encoder", "always ties"),
        ("umt5", "something different|always ties"),  # transformers 5.24 ties it always, and scales by another key
        ("switch", "something different"),
    ],
)
def test_what_cannot_be_untied_says_why(name: str, why: str, tmp_path: Path) -> None:
    _, skeleton = saved(name, tmp_path / "source")
    result = untie(skeleton, torch.bfloat16)
    assert result.skeleton is skeleton
    assert not result.free and not result.config
    assert set(result.stuck) == {spec.name for spec in skeleton if spec.tied_to}
    assert all(re.search(why, reason) for reason in result.stuck.values())


def test_a_model_without_ties(checkpoints: Callable[[str], Path]) -> None:
    component = identify(resolve(str(checkpoints("bert")))).component("")
    assert component is not None
    skeleton = build_skeleton(component, torch.bfloat16)
    result = untie(skeleton, torch.bfloat16)
    assert result.skeleton is skeleton
    assert not (result.free or result.stuck or result.config)
