"""What a forward pass proves: only what the original takes, and the result does not, is a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from aoconvert import inputs
from aoconvert.verification.children import forward_pass

_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def made(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, dict[str, Any]]:
    """The model quantized in memory, and how its original is opened from the folder."""
    torch.manual_seed(0)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    quantize_(model, Int8WeightOnlyConfig())
    how = {
        "library": type(model).__module__.partition(".")[0],
        "class_name": type(model).__name__,
        "variant": None,
        "auto_class": None,
    }
    how |= {"module": how["library"], "folder": str(folder), "dtype": str(dtype).rpartition(".")[2], "trust": False}
    return model, how


def passed(model: Any, how: dict[str, Any] | None = None) -> dict[str, Any]:
    return forward_pass.attempt_forward(model, how)


def test_the_output_is_compared_with_the_originals(tmp_path: Path) -> None:
    model, how = made(tiny.clip_text("CLIPTextModelWithProjection"), tmp_path)
    answer = passed(model, how)
    found = inputs.find_inputs(model, inputs.from_libraries(model))
    original = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        before, after = (inputs.first_tensors(one(**found.make())) for one in (original, model))
    signal = sum(float(a.double().square().sum()) for a in before)
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(before, after, strict=True))
    expected = 10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)).item()
    assert answer["status"] == "passed"
    assert answer["output_sqnr_db"] == pytest.approx(expected, abs=1e-3)
    assert f"{expected:.1f} dB SQNR to the original's" in answer["detail"]


def test_equal_outputs_have_no_figure(tmp_path: Path) -> None:
    model, how = made(tiny.image_vae(), tmp_path)
    model = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    answer = passed(model, how)
    assert (answer["status"], answer["output_sqnr_db"]) == ("passed", None)
    assert answer["detail"].endswith("equal to the original's")


@pytest.mark.parametrize("with_source", [True, False])
def test_what_only_the_result_does_not_take_is_a_failure(with_source: bool, tmp_path: Path) -> None:
    """Falcon permutes its weights, which torchao's int8 tensors cannot."""
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model, how = made(transformers.FalconForCausalLM(config), tmp_path)
    answer = passed(model, how if with_source else None)
    assert answer["status"] == "failed"
    assert "the forward pass of FalconForCausalLM failed" in answer["detail"]


@pytest.mark.parametrize("with_source", [True, False])
def test_what_the_original_does_not_take_either_is_skipped(with_source: bool, tmp_path: Path) -> None:
    """FNet's Fourier transform has no bfloat16 on a CPU."""
    model, how = made(transformers.FNetModel(transformers.FNetConfig(**_TEXT)), tmp_path)
    answer = passed(model, how if with_source else None)
    assert answer["status"] == "skipped"
    assert "BFloat16" in answer["detail"]


def overflowing(folder: Path) -> Any:
    model = tiny.sd3_transformer()
    with torch.no_grad():
        model.proj_out.weight.fill_(3e38)
        model.proj_out.bias.fill_(3e38)
    return made(model, folder, torch.float32)


def test_an_output_that_is_not_finite(tmp_path: Path) -> None:
    broken, how = overflowing(tmp_path / "broken")
    assert passed(broken)["status"] == "failed"
    answer = passed(broken, how)
    assert answer["status"] == "skipped"
    assert "the original's is not either" in answer["detail"]
    whole, how = made(tiny.sd3_transformer(), tmp_path / "whole", torch.float32)
    answer = passed(broken, how)
    assert (answer["status"], answer["detail"]) == ("failed", "the output of SD3Transformer2DModel is not finite")
    assert passed(whole, how)["status"] == "passed"


def test_an_original_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, how = made(tiny.clip_text("CLIPTextModel"), tmp_path)
    package = forward_pass.load_inputs()
    found = package.find_inputs(model)
    monkeypatch.setattr(package, "available_memory", lambda: 1000)
    answer = forward_pass.run_forward(model, found, package, how)
    assert (answer["status"], answer["output_sqnr_db"]) == ("passed", None)
    assert "not compared: the original needs 0.0 GB of memory" in answer["detail"]
