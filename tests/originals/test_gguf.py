"""GGUF files of language models: what is read equals what transformers makes of the file, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from helpers import gguf_files
from helpers.bits import assert_same
from helpers.quantized_originals import written
from safetensors.torch import save_file

import aoconvert
from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.engine.read import ComponentReading
from aoconvert.environment import version_of
from aoconvert.errors import SourceError
from aoconvert.humanize import size
from aoconvert.verification.numbers import compare_with_source
from aoconvert.verification.original import resolve_original


def opened(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


def assert_as_opened(file: Path, dtype: str, folder: Path) -> Any:
    """Every tensor of the plan, whole and in rows from an odd place on."""
    reference = opened(file, getattr(torch, dtype))
    options: dict[str, Any] = {"dtype": dtype, "min_quantized": 0.0, "default_skips": False}
    plan = aoconvert.plan(file, "int8wo", device="cpu", **options)
    [component] = plan.components
    assert {tensor.name for tensor in component.tensors} == set(reference)
    with ComponentReading(component, plan, folder) as reading:
        for tensor in component.tensors:
            if tensor.action == "tied":
                continue
            expected = reference[tensor.name].contiguous()
            assert_same(reading.read(tensor, None, None).to(expected.dtype), expected, tensor.name)
            rows = (1, max(2, tensor.shape[0] - 1))
            assert_same(reading.read(tensor, rows, None).to(expected.dtype), expected[slice(*rows)], tensor.name)
    return plan


_BY_DEFAULT = ("llama", "gemma2", "qwen3moe")  # rows in another order, values changed, tensors put together


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in _BY_DEFAULT else pytest.mark.exhaustive)
        for name in gguf_files.LANGUAGE_MODELS
    ],
)
def test_the_tensors_are_those_that_transformers_makes(name: str, tmp_path: Path) -> None:
    file = gguf_files.language_model(tmp_path / "source", name)
    for dtype in ("float32", "bfloat16"):
        plan = assert_as_opened(file, dtype, tmp_path)
        [component] = plan.components
        assert component.original is not None
        assert component.original.method == "gguf"
        assert not component.dropped


def test_a_conversion_says_that_the_original_was_quantized_and_is_verified(tmp_path: Path) -> None:
    file = gguf_files.language_model(tmp_path / "source", kind=gguf_files.uniform(Kind.Q8_0))
    model = opened(file, torch.bfloat16)
    result = aoconvert.quantize(file, "int8wo", output=tmp_path / "out", device="cpu")
    assert result.manifest.run.command == "aoconvert quantize model.gguf --scheme int8wo --device cpu"
    assert (result.manifest.source.kind, result.manifest.source.config) == ("file", None)
    [component] = result.manifest.components
    assert component.original is not None
    assert component.original.how == "Q8_0 ×16, F32 ×5"
    assert component.original.dequantized_by == f"gguf {version_of('gguf')}"
    assert (component.original.tensors, component.original.dtype) == (16, "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "torchao"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer("ab<7>").input_ids == expected("ab<7>").input_ids
    assert "tokenizer.json" in {entry.path for entry in result.manifest.files()}
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({name: tensor.clone() for name, tensor in model.items()}, plain / "model.safetensors", {"format": "pt"})
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    aoconvert.quantize(plain, "int8wo", output=tmp_path / "reference", device="cpu")
    reference, found = written(tmp_path / "reference"), written(tmp_path / "out")
    assert reference.keys() == found.keys()
    for name, tensor in reference.items():
        assert_same(found[name], tensor, name)
    target = from_manifest(tmp_path / "out", result.manifest)
    source = resolve_original(str(file), tmp_path / "out")
    worst, count, problems = compare_with_source(target, source, None, [])
    assert (count, problems) == (21, [])
    assert worst > 30


def test_a_file_that_is_not_quantized_keeps_its_dtype(tmp_path: Path) -> None:
    file = gguf_files.language_model(tmp_path / "source", kind=gguf_files.uniform(Kind.F16))
    plan = aoconvert.plan(file, "int8wo", device="cpu", dtype="auto")
    [component] = plan.components
    assert component.dtype == "float16"
    assert component.original is not None
    assert component.original.tensors == 0
    assert "LlamaForCausalLM: the source is a GGUF file that is not quantized (F16 ×16, F32 ×5)" in plan.warnings


def test_a_tokenizer_that_transformers_does_not_make_is_named(tmp_path: Path) -> None:
    values = {"tokenizer.ggml.merges": ["x y"]}  # of tokens that are not there
    plan = aoconvert.plan(gguf_files.language_model(tmp_path / "source", **values), "int8wo", device="cpu")
    assert any(line.startswith("LlamaForCausalLM: its tokenizer is not carried over") for line in plan.warnings)
    assert not plan.copied


def test_an_architecture_that_transformers_does_not_convert_is_named(tmp_path: Path) -> None:
    values = np.zeros((4, 32), dtype=np.float32)
    file = gguf_files.write(tmp_path / "m.gguf", "grok", {}, {"token_embd.weight": (values, Kind.F32)})
    with pytest.raises(SourceError) as caught:
        aoconvert.plan(file, "int8wo", device="cpu")
    assert caught.value.message.startswith(f"m.gguf: transformers {version_of('transformers')} has no conversion")
    assert caught.value.message.endswith("for a GGUF file of the architecture 'grok'")
    assert "--config" in (caught.value.hint or "")


def test_without_gguf_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf_files.language_model(tmp_path / "source")
    monkeypatch.setattr("aoconvert.models.gguf.find_spec", lambda _name: None)
    with pytest.raises(SourceError, match=r"model\.gguf is a GGUF file, and gguf is not installed") as caught:
        aoconvert.plan(file, "int8wo", device="cpu")
    assert (caught.value.hint or "").startswith("pip install gguf")


def test_a_file_cut_short_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    file = gguf_files.language_model(tmp_path / "source")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SourceError, match=r"model\.gguf is truncated: tensor '.*' ends at byte") as caught:
        aoconvert.quantize(file, "int8wo", output=tmp_path / "out", device="cpu")
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_architecture_with_conversions_of_its_own_is_named(tmp_path: Path) -> None:
    values = np.zeros((4, 32), dtype=np.float32)
    file = gguf_files.write(tmp_path / "m.gguf", "lfm2", {}, {"token_embd.weight": (values, Kind.F32)})
    with pytest.raises(SourceError, match=r"m\.gguf: aoconvert does not read GGUF files of the architecture 'lfm2'"):
        aoconvert.plan(file, "int8wo", device="cpu")


def test_a_result_that_is_larger_than_its_source_is_said(tmp_path: Path) -> None:
    """8 bits of what has 4 in the file: a warning in the plan and in the result, with both sizes."""
    file = gguf_files.language_model(tmp_path / "source", kind=gguf_files.uniform(Kind.Q4_0))
    options: dict[str, Any] = {"device": "cpu", "min_quantized": 0.0}
    plan = aoconvert.plan(file, "int8wo", **options)
    totals = plan.components[0].totals
    assert totals.bytes_out > totals.bytes_in
    [line] = [warning for warning in plan.warnings if "larger than its source" in warning]
    assert f"{size(totals.bytes_in)} become {size(totals.bytes_out)}" in line
    result = aoconvert.quantize(file, "int8wo", output=tmp_path / "out", **options)
    assert line in result.warnings
    larger = gguf_files.language_model(tmp_path / "larger", kind=gguf_files.uniform(Kind.Q8_0))
    smaller = aoconvert.plan(larger, "int4wo", **options)
    assert not any("larger than its source" in warning for warning in smaller.warnings)
