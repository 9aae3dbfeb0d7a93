"""Sources by NVIDIA's Model Optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bits import assert_same
from helpers.checkpoints import build_llama
from helpers.quantized_originals import State, edit, modelopt, rewrite, written
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.errors import SourceError

K = "model.layers.0.self_attn.k_proj"


def dequantized(source: Path) -> State:
    """``FP8QTensor.dequantize`` of nvidia-modelopt with float32: a code times its scale."""
    state = load_file(source / "model.safetensors")
    found: State = {}
    for name, tensor in state.items():
        if name.endswith(".weight") and tensor.dtype == torch.float8_e4m3fn:
            scale = state[f"{name}_scale"]
            found[name] = tensor.to(torch.float32) * (scale[:, None] if scale.dim() else scale)
        elif not name.endswith("_scale"):
            found[name] = tensor
    return found


@pytest.mark.parametrize("per_row", [False, True])
def test_the_result_is_that_of_the_dequantized_model(per_row: bool, tmp_path: Path) -> None:
    source = rewrite(build_llama(tmp_path / "source"), *modelopt(per_row=per_row))
    plain = tmp_path / "plain"
    plain.mkdir()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    save_file(dequantized(source), plain / "model.safetensors", {"format": "pt"})
    options: Any = {"scheme": "int8wo", "device": "cpu"}
    made = aoconvert.quantize(source, output=tmp_path / "made", **options)
    aoconvert.quantize(plain, output=tmp_path / "reference", **options)
    here, there = written(tmp_path / "made"), written(tmp_path / "reference")
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert_same(here[name], tensor, name)
    [component] = made.manifest.components
    assert component.original is not None
    assert component.original.how == (
        "FP8_PER_CHANNEL_PER_TOKEN: float8 with a scale for each row"
        if per_row
        else "FP8: float8 with a scale for each tensor"
    )
    reasons = {item.name: item.reason for item in component.dropped}
    assert reasons[f"{K}.k_scale"] == "scales a quantized key-value cache, which no weight depends on"
    if not per_row:
        assert reasons[f"{K}.input_scale"].startswith("scales activations that the original quantizes")


def test_the_algorithm_may_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    source = rewrite(build_llama(tmp_path / "source"), *modelopt(scale_shape=(1,)))
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    assert aoconvert.inspect(source).components[0].kind == "modelopt"
    plan = aoconvert.plan(source, "int8wo", device="cpu").to_dict()
    assert plan["components"][0]["original"]["method"] == "modelopt"
    assert [item["path"] for item in plan["left_behind"]] == ["hf_quant_config.json"]


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_AWQ", "MIXED_PRECISION", "FP8_PB_WO"])
def test_another_algorithm_is_refused_by_name(algorithm: str, tmp_path: Path) -> None:
    config = {"quant_method": "modelopt", "quant_algo": algorithm}
    source = build_llama(tmp_path / "model", quantization_config=config)
    with pytest.raises(SourceError) as caught:
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert caught.value.message == f"LlamaForCausalLM is already quantized (modelopt, {algorithm})"
    assert "FP8 and FP8_PER_CHANNEL_PER_TOKEN are read" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop(f"{K}.weight_scale"), f"{K}.weight is float8_e4m3fn, and no scale belongs to it"),
        (
            lambda state: state.update({f"{K}.weight_scale": torch.ones(5)}),
            f"{K}.weight_scale has the shape [5], but {K}.weight needs [32]",
        ),
        (
            lambda state: state.pop(f"{K}.weight"),
            f"{K}.weight_scale needs a matrix of float8_e4m3fn, but its weight is not there",
        ),
        (
            lambda state: state.update({f"{K}.pre_quant_scale": torch.ones(64)}),
            f"{K}.pre_quant_scale belongs to another algorithm of ModelOpt than FP8",
        ),
    ],
    ids=["no scale", "other shape", "no weight", "AWQ"],
)
def test_what_does_not_fit_is_named(change: Any, problem: str, tmp_path: Path) -> None:
    source = rewrite(build_llama(tmp_path / "source"), *modelopt())
    edit(source, change)
    with pytest.raises(SourceError) as caught:
        aoconvert.plan(source, "int8wo", device="cpu")
    assert caught.value.message == f"LlamaForCausalLM: {problem}"
