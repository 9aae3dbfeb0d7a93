"""``--format safetensors``: what it writes is opened by the libraries, and holds what the ``.bin`` holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel
from helpers import tiny
from helpers.checkpoints import build_llama, pipeline
from safetensors import safe_open
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import aoconvert
from aoconvert.errors import PlanError, UsageError
from aoconvert.formats.content import content_sha256

__all__ = ["pipeline"]

SHAPE = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 64}
OPTIONS: dict[str, Any] = {"min_quantized": 0.0, "device": "cpu"}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "aoconvert.json").read_text())
    return found


def contents(folder: Path) -> list[Any]:
    """What the manifest says of the tensors, less what depends on their file."""
    return [
        {key: value for key, value in tensor.items() if key != "file"}
        for part in manifest(folder)["components"]
        for tensor in part["tensors"]
    ]


@pytest.mark.parametrize(
    ("scheme", "needs"),
    [
        ("int8wo", ">=0.18"),
        pytest.param("float8wo", ">=0.15", marks=pytest.mark.exhaustive),
        pytest.param("int4dq", ">=0.15", marks=pytest.mark.exhaustive),
        pytest.param("mxfp8", ">=0.17", marks=pytest.mark.exhaustive),
    ],
)
def test_transformers_opens_the_same_model_as_from_bin(tmp_path: Path, scheme: str, needs: str) -> None:
    source = build_llama(tmp_path / "model", **SHAPE)
    for format_ in ("bin", "safetensors"):
        shards = {"max_shard_size": "150KB"} if format_ == "safetensors" else {}
        aoconvert.quantize(source, scheme, output=tmp_path / format_, format=format_, **OPTIONS, **shards)
    [entry] = manifest(tmp_path / "safetensors")["components"]
    assert (entry["format"], entry["safe_globals"], entry["loads_with"]["torchao"]) == ("safetensors", [], needs)
    assert len([file for file in entry["files"] if file["path"].endswith(".safetensors")]) > 1
    assert contents(tmp_path / "safetensors") == contents(tmp_path / "bin")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / format_) for format_ in ("bin", "safetensors")]
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys()
    assert all(type(one[name]) is type(other[name]) for name in one)
    assert all(content_sha256(one[name].detach()) == content_sha256(other[name].detach()) for name in one)


def test_diffusers_opens_a_model_with_a_name_without_a_dot(tmp_path: Path) -> None:
    tiny.wan_transformer().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options = {**OPTIONS, "max_shard_size": "150KB"}
    aoconvert.quantize(tmp_path / "model", "int8wo", output=tmp_path / "out", format="safetensors", **options)
    [entry] = manifest(tmp_path / "out")["components"]
    assert any("." not in tensor["name"] for tensor in entry["tensors"])
    assert "use_safetensors" not in entry["load"]["kwargs"]
    model = AutoModel.from_pretrained(str(tmp_path / "out"), torch_dtype=torch.bfloat16)
    state = model.state_dict()
    assert {tensor["name"]: tensor["sha256"] for tensor in entry["tensors"]}.items() >= {
        name: content_sha256(tensor.detach()) for name, tensor in state.items() if tensor.dtype == torch.bfloat16
    }.items()


@pytest.mark.parametrize("family", ["transformers", pytest.param("diffusers", marks=pytest.mark.exhaustive)])
def test_verify_proves_it(tmp_path: Path, family: str) -> None:
    if family == "transformers":
        build_llama(tmp_path / "model", **SHAPE)
    else:
        tiny.wan_transformer().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    aoconvert.quantize(tmp_path / "model", "int8wo", output=tmp_path / "out", format="safetensors", **OPTIONS)
    source = str(tmp_path / "model") if family == "diffusers" else None
    report = aoconvert.verify(tmp_path / "out", source=source)
    assert report.ok, report.checks
    assert report.strategy == "from-pretrained"


@pytest.mark.exhaustive
def test_what_transformers_itself_saved_is_shown_and_verified(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", **SHAPE)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    assert aoconvert.inspect(tmp_path / "saved").to_dict()["next"] == f"aoconvert verify {tmp_path / 'saved'}"
    report = aoconvert.verify(tmp_path / "saved")
    assert report.ok, report.checks


def test_a_pipeline_has_one_format(tmp_path: Path, pipeline: Path) -> None:
    aoconvert.quantize(pipeline, "int8wo", output=tmp_path / "out", format="safetensors", **OPTIONS)
    assert not list((tmp_path / "out").rglob("*.bin"))
    card = aoconvert.card(tmp_path / "out").text
    assert "prototype" in card
    assert "a `.bin` names" not in card
    with safe_open(tmp_path / "out/text_encoder/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_torchao_has_no_safetensors_of_is_refused_in_one_line_for_each_kind(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", **SHAPE)
    options = {**OPTIONS, "group_size": 32, "layout_device": "cpu"}
    with pytest.raises(PlanError) as caught:
        aoconvert.quantize(source, "int4wo", output=tmp_path / "out", format="safetensors", **options)
    assert caught.value.exit_code == 3
    [line] = caught.value.problems
    assert "Int4OpaqueTensor" in line
    assert "--format bin" in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'gguf' is not one of bin, safetensors"):
        aoconvert.quantize(tmp_path, "int8wo", format="gguf")
