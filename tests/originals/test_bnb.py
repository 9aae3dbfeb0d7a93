"""Sources by bitsandbytes, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import build_llama
from helpers.quantized_originals import assert_as_opened, edit

import aoconvert
from aoconvert.errors import SourceError

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install -e .[test])")

KINDS: dict[str, dict[str, Any]] = {
    "nf4 nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


FIRST = ("nf4 nested", "int8")


def build(folder: Path, kind: str) -> Path:
    """Written by the library; its rows of 96 values do not end where blocks of 64 do."""
    plain = build_llama(folder / "unquantized", hidden_size=96, num_attention_heads=4)
    config = transformers.BitsAndBytesConfig(**KINDS[kind])
    model = transformers.LlamaForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "source")
    return folder / "source"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FIRST else pytest.mark.exhaustive) for kind in KINDS]
)
def test_the_result_is_that_of_the_library_s_dequantized_model(kind: str, tmp_path: Path) -> None:
    source = build(tmp_path, kind)
    opened = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).dequantize()
    result = assert_as_opened(source, opened, tmp_path)
    [component] = result.manifest.components
    assert component.original is not None
    assert (component.original.method, component.original.tensors) == ("bitsandbytes", 14)


K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("int8", lambda state: state.pop(f"{K}.SCB"), f"{K}.weight is int8, and no scale belongs to it"),
        ("fp4", lambda state: state.pop(f"{K}.weight.absmax"), f"{K}.weight has no {K}.weight.absmax beside it"),
        (
            "fp4",
            lambda state: state.update({f"{K}.weight": state[f"{K}.weight"][:-1].clone()}),
            f"{K}.weight has 2303 bytes, but [48, 96] takes 2304",
        ),
        (
            "fp4",
            lambda state: state.update(
                {f"{K}.weight.quant_state.bitsandbytes__fp4": torch.zeros(3, dtype=torch.uint8)}
            ),
            f"{K}.weight.quant_state.bitsandbytes__fp4 does not describe a matrix in 4 bits",
        ),
    ],
    ids=["no scale", "no absmax", "cut off", "no state"],
)
def test_what_does_not_fit_is_named(kind: str, change: Any, problem: str, tmp_path: Path) -> None:
    source = build(tmp_path, kind)
    edit(source, change)
    with pytest.raises(SourceError) as caught:
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert caught.value.message == f"LlamaForCausalLM: {problem}"
    assert not (tmp_path / "out").exists()
