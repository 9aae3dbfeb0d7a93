"""The result opens as its source did: the same tensors, the same ties, the same report of the library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import tiny
from helpers.as_library import UNKNOWN, build, differ, save
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.checkpoint import manifest
from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.checkpoint.load_code import load_code
from aoconvert.cli.main import cli

T: Any = tiny.transformers
State = dict[str, torch.Tensor]


def _t5(folder: Path) -> Any:
    """Both names of what is declared one, with other values, and tensors that the class does not know."""
    cls, state, config = build("T5ForConditionalGeneration v1.1")
    save(folder, config, differ(state, "lm_head.weight") | UNKNOWN)
    return cls


def _encoder_alone(folder: Path) -> Any:
    """Of four names for one tensor the one that the class takes from another."""
    cls, state, config = build("T5ForConditionalGeneration")
    names = ("shared.weight", "lm_head.weight", "decoder.embed_tokens.weight")
    save(folder, config, {key: value for key, value in state.items() if key not in names})
    return cls


def _prediction(folder: Path) -> Any:
    """A layer for multi-token prediction, with experts, under the name that the class ignores."""
    config = T.Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    )
    T.Glm4MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    layer = {key.replace(".1.", ".46.", 1): value.clone() for key, value in state.items() if ".layers.1." in key}
    extra = {"model.layers.46.eh_proj.weight": torch.ones(32, 64).bfloat16()}
    save_file(state | layer | extra, folder / "model.safetensors", {"format": "pt"})
    return T.Glm4MoeForCausalLM


def _marian(folder: Path) -> Any:
    cls, _, config = build("MarianMTModel")
    cls(config).bfloat16().save_pretrained(folder)
    return cls


def _headless(folder: Path) -> Any:
    """A base class beside the weights of one with a head."""
    _, state, config = build("LlamaForCausalLM")
    config.tie_word_embeddings = False
    config.architectures = ["LlamaModel"]
    save(folder, config, state)
    return T.LlamaModel


SOURCES: dict[str, Callable[[Path], Any]] = {
    "both names": _t5,
    "one name": _encoder_alone,
    "prediction": _prediction,
    "class makes it": _marian,
    "base class": _headless,
}


def parts(model: Any) -> set[frozenset[str]]:
    """Which names are one parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in groups.values()}


def assert_model_alike(opened: Any, original: Any) -> None:
    assert parts(opened) == parts(original)
    wanted = original.state_dict()
    found = opened.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if type(found[name]) in (torch.Tensor, torch.nn.Parameter):
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", SOURCES)
def test_a_result_opens_as_its_source(name: str, tmp_path: Path) -> None:
    cls = SOURCES[name](tmp_path / "source")
    done = aoconvert.quantize(tmp_path / "source", "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    original, report = cls.from_pretrained(tmp_path / "source", dtype=torch.bfloat16, output_loading_info=True)
    opened, again = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert_model_alike(opened, original)
    assert again["unexpected_keys"] == report["unexpected_keys"]
    assert again["missing_keys"] == report["missing_keys"]

    entry = done.manifest.components[0]
    source = load_file(tmp_path / "source" / "model.safetensors")
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    carried = {tensor.name for tensor in entry.tensors if tensor.action == "carry"}
    assert bool(carried) == (name in ("both names", "prediction", "base class"))
    for key in carried:
        assert (written[key].dtype, written[key].shape) == (source[key].dtype, source[key].shape)
        assert torch.equal(written[key], source[key])
    assert {tensor.file for tensor in entry.tensors if tensor.name in carried} <= {"pytorch_model.bin"}

    if name != "class makes it":
        names: dict[str, Any] = {}
        target = from_manifest(tmp_path / "out", manifest.load(tmp_path / "out"))
        exec(load_code(target, str(tmp_path / "out"), "assign", device="cpu"), names)
        assert_model_alike(names["model"], original)


def test_prediction_layers_are_left_out_of_weights_and_config(tmp_path: Path) -> None:
    cls = _prediction(tmp_path / "source")
    done = aoconvert.quantize(
        tmp_path / "source", "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0, drop_unknown=True
    )
    entry = done.manifest.components[0]
    assert not [tensor for tensor in entry.tensors if tensor.action == "carry"]
    assert {item.name.split(".")[2] for item in entry.dropped} == {"46"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert "--drop-unknown" in done.manifest.run.command
    assert cls.from_pretrained(tmp_path / "out").config.num_nextn_predict_layers == 0


def test_tensors_that_are_left_to_the_library_are_named(tmp_path: Path) -> None:
    _, state, config = build("LlamaForCausalLM")
    del state["lm_head.weight"], state["model.norm.weight"]
    source = save(tmp_path / "source", config, state)
    done = aoconvert.quantize(
        source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0, allow_missing="model.norm"
    )
    [entry] = done.manifest.components[0].missing
    assert entry.name == "model.norm.weight"
    assert entry.reason == "not in the checkpoint (--allow-missing model.norm)"
    assert "--allow-missing model.norm" in done.manifest.run.command
    assert any("left to the library: model.norm.weight" in line for line in done.warnings)
    _, report = T.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert report["missing_keys"] == {"model.norm.weight"}


def test_quantize_and_verify_in_one_command_know_what_was_carried_and_what_is_apart(tmp_path: Path) -> None:
    _t5(tmp_path / "source")
    words = ["quantize", str(tmp_path / "source"), "--scheme", "int8wo", "--device", "cpu", "--min-quantized", "0"]
    done = CliRunner().invoke(cli, [*words, "--verify", "--json", "-o", str(tmp_path / "out")], standalone_mode=False)
    verification = json.loads(done.stdout)["verification"]
    assert done.return_value == 0
    assert verification["ok"] is True, verification
    assert verification["strategy"] == "from-pretrained"
    assert {check["name"]: check["status"] for check in verification["checks"]}["library"] == "passed"
    assert (tmp_path / "out/aoconvert.verify.json").exists()


def test_the_card_names_what_is_not_the_models_and_what_is_not_there(tmp_path: Path) -> None:
    _, state, config = build("LlamaForCausalLM")
    del state["lm_head.weight"], state["model.norm.weight"]
    source = save(tmp_path / "source", config, state | UNKNOWN)
    options: dict[str, Any] = {"device": "cpu", "min_quantized": 0.0, "allow_missing": "model.norm.weight"}
    aoconvert.quantize(source, "int8wo", output=tmp_path / "carried", **options)
    text = aoconvert.card(tmp_path / "carried").text
    assert "the model class does not know `model.embeddings.position_ids`" in text
    assert "the source does not hold `model.norm.weight`: transformers initializes it" in text
    aoconvert.quantize(source, "int8wo", output=tmp_path / "dropped", drop_unknown=True, **options)
    assert "files also hold `model.embeddings.position_ids`" in aoconvert.card(tmp_path / "dropped").text
