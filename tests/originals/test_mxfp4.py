"""Sources in MXFP4, as gpt-oss is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.quantized_originals import assert_as_opened, edit, rewrite

import aoconvert
from aoconvert.errors import SourceError

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def stored(name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Values of all codes and of exponents far apart, in the layout of the experts."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: weight}
    experts, columns, rows = weight.shape
    generator = torch.Generator().manual_seed(len(name))
    groups = (experts, rows, columns // 32)
    blocks = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 130, groups, dtype=torch.uint8, generator=generator)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def build(folder: Path) -> Path:
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    return rewrite(folder, CONFIG, stored)


def test_the_result_is_that_of_the_library_s_dequantized_model(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    opened = transformers.GptOssForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    result = assert_as_opened(source, opened, tmp_path)
    [component] = result.manifest.components
    assert component.original is not None
    assert (component.original.method, component.original.tensors) == ("mxfp4", 4)
    assert component.original.how == "float4 with a power of two for each group of 32"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state, at: state.pop(f"{at}_scales"), "{at}_blocks has no {at}_scales beside it"),
        (
            lambda state, at: state.update({f"{at}_scales": torch.zeros(4, 64, 3, dtype=torch.uint8)}),
            "{at}_scales has the shape [4, 64, 3], but {at}_blocks needs [4, 64, 1]",
        ),
    ],
    ids=["missing", "other shape"],
)
def test_what_does_not_fit_is_named(change: Any, problem: str, tmp_path: Path) -> None:
    source, at = build(tmp_path / "source"), "model.layers.1.mlp.experts.down_proj"
    edit(source, lambda state: change(state, at))
    with pytest.raises(SourceError) as caught:
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert caught.value.message == f"GptOssForCausalLM: {problem.format(at=at)}"
    assert not (tmp_path / "out").exists()
