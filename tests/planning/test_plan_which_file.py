"""Which file is read: the one that the library would load, or none and one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.as_library import assert_as_library, build, planned, save
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.errors import AoconvertError, SourceError

T: Any = tiny.transformers
OTHER = "other.safetensors"


def llama(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """A Llama, with ``config`` in its config.json; its tensors."""
    _, state, made = build("LlamaForCausalLM")
    del state["lm_head.weight"]
    save(folder, made, state)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return state


def changed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in state.items()}


def _named(folder: Path) -> None:
    save_file(changed(llama(folder, transformers_weights=OTHER)), folder / OTHER, {"format": "pt"})


def _indexed(folder: Path) -> None:
    state = changed(llama(folder, transformers_weights=f"{OTHER}.index.json"))
    save_file(state, folder / OTHER, {"format": "pt"})
    places = {"metadata": {}, "weight_map": dict.fromkeys(state, OTHER)}
    (folder / f"{OTHER}.index.json").write_text(json.dumps(places))


def _adapter(folder: Path) -> None:
    torch.save(changed(llama(folder, transformers_weights="adapter_model.bin")), folder / "adapter_model.bin")


def _in_a_folder(folder: Path) -> None:
    state = changed(llama(folder, transformers_weights=f"inner/{OTHER}"))
    (folder / "inner").mkdir()
    save_file(state, folder / "inner" / OTHER, {"format": "pt"})


def _both_formats(folder: Path) -> None:
    torch.save(changed(llama(folder)), folder / "pytorch_model.bin")


def _index_beside_one_file(folder: Path) -> None:
    state = changed(llama(folder))
    save_file(state, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    places = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


CASES: dict[str, Callable[[Path], None]] = {
    "named": _named,
    "named index": _indexed,
    "named adapter": _adapter,
    "named in a folder": _in_a_folder,
    "safetensors and bin": _both_formats,
    "one file and an index": _index_beside_one_file,
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_that_the_library_loads_is_read(name: str, tmp_path: Path) -> None:
    CASES[name](tmp_path / "source")
    assert_as_library(tmp_path / "source", T.LlamaForCausalLM)


def test_the_result_does_not_name_another_file(tmp_path: Path) -> None:
    _named(tmp_path / "source")
    aoconvert.quantize(tmp_path / "source", "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
    opened = T.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    wanted = load_file(tmp_path / "source" / OTHER)["model.embed_tokens.weight"]
    assert torch.equal(opened.model.embed_tokens.weight, wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "a file that transformers does not load"),
        ("../model.safetensors", "which is outside the folder"),
        ("gone.safetensors", "which does not exist"),
        (3, "a file that transformers does not load"),
    ],
)
def test_a_name_that_the_library_refuses_is_one_line(name: Any, message: str, tmp_path: Path) -> None:
    llama(tmp_path / "source", transformers_weights=name)
    with pytest.raises(Exception):  # noqa: B017  (the library's own refusals are of many kinds)
        T.LlamaForCausalLM.from_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match=message) as caught:
        planned(tmp_path / "source")
    assert "\n" not in caught.value.message


def test_a_distributed_checkpoint_goes_before_all_others(tmp_path: Path) -> None:
    state = llama(tmp_path / "source")
    save_file(state, tmp_path / "source" / "shard-00001-model-00001-of-00001.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="belongs to a distributed checkpoint"):
        planned(tmp_path / "source")


def test_a_config_that_leads_to_another_config(tmp_path: Path) -> None:
    llama(tmp_path / "source", configuration_files=["config.4.0.0.json", "config.99.0.0.json"])
    values = json.loads((tmp_path / "source" / "config.json").read_text())
    del values["configuration_files"]
    (tmp_path / "source" / "config.4.0.0.json").write_text(json.dumps({**values, "rms_norm_eps": 0.25}))
    (tmp_path / "source" / "config.99.0.0.json").write_text("{}")
    assert_as_library(tmp_path / "source", T.LlamaForCausalLM)
    aoconvert.quantize(tmp_path / "source", "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    opened = T.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.config.rms_norm_eps == 0.25
    assert type(opened.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"


def test_a_class_that_reads_more_files_is_refused(tmp_path: Path) -> None:
    """``JevForDecision``: a head in a file beside the weights."""
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = T.JevConfig(hidden_size=64, text_config=text)
    model = T.JevForDecision(config)
    model.save_pretrained(tmp_path / "source")
    assert planned(tmp_path / "source").totals.quantized_parameters
    (tmp_path / "source" / "head.safetensors").write_bytes((tmp_path / "source" / "model.safetensors").read_bytes())
    with pytest.raises(AoconvertError, match=r"its class also reads head\.safetensors"):
        planned(tmp_path / "source")


@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_beside_the_weights_is_said(weights: bool, tmp_path: Path) -> None:
    state = llama(tmp_path / "source")
    (tmp_path / "source" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if weights:
        save_file(state, tmp_path / "source" / "adapter_model.safetensors")
    made = aoconvert.plan(tmp_path / "source", "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    said = [line for line in made.warnings if "adapter" in line]
    assert len(said) == 1
    assert ("is loaded with the weights where peft is installed" in said[0]) == weights
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert {item.path for item in made.copied} & files == (files if weights else set())
    assert {item.path for item in made.left_behind} & files == (set() if weights else {"adapter_config.json"})
