"""The plan has what the library has when it opens the same checkpoint: every tensor, every tie, and what it misses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.as_library import MODELS, UNKNOWN, State, assert_as_library, build, differ, planned, save
from safetensors.torch import save_file

import aoconvert
from aoconvert.errors import PlanError

_HEAD = ("shared.weight", "lm_head.weight")
_ALL = (*_HEAD, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def _mostly(names: list[str], first: str) -> list[Any]:
    """One by default, the others only where the whole table is asked for."""
    return [name if name == first else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


@pytest.mark.parametrize("name", _mostly([n for n in MODELS if "T5F" in n], "T5ForConditionalGeneration v1.1"))
@pytest.mark.parametrize(
    ("there", "differing", "apart"),
    [
        (_ALL, (), 0),
        (_ALL, ("lm_head.weight",), 1),
        (_ALL, ("encoder.embed_tokens.weight", "lm_head.weight"), 2),
        (_HEAD, ("lm_head.weight",), 1),
        (_HEAD, (), 0),
        (("lm_head.weight",), (), 0),
        (("decoder.embed_tokens.weight",), (), 0),
        (_ALL[2:], (), 0),
        (_ALL[2:], ("decoder.embed_tokens.weight",), 1),
        (_ALL[1:], ("decoder.embed_tokens.weight", "lm_head.weight"), 2),
    ],
)
def test_a_tie_is_decided_by_what_the_checkpoint_holds(
    name: str, there: tuple[str, ...], differing: tuple[str, ...], apart: int, tmp_path: Path
) -> None:
    cls, state, config = build(name)
    table = state["shared.weight"]
    state |= {key: table.clone() for key in _ALL}
    for key in set(_ALL) - set(there):
        del state[key]
    plan = assert_as_library(save(tmp_path / "source", config, differ(state, *differing)), cls)
    assert len(plan.apart) == apart


@pytest.mark.parametrize("name", [name for name in MODELS if "T5" not in name and name != "MarianMTModel"])
@pytest.mark.parametrize("case", _mostly(["both", "differ", "only the first", "only the second"], "differ"))
def test_every_declared_tie(name: str, case: str, tmp_path: Path) -> None:
    cls, state, config = build(name)
    with torch.device("meta"):
        ties = cls(config).all_tied_weights_keys
    assert ties
    for target, origin in ties.items():
        state[target] = state[origin].clone()
        state[target] += case == "differ"
    for target, origin in ties.items() if case.startswith("only") else ():
        first = next(name for name, source in ties.items() if source == origin)
        kept = first if case == "only the second" else origin
        for key in {target, origin} - {kept}:
            state.pop(key, None)
    plan = assert_as_library(save(tmp_path / "source", config, state), cls)
    assert bool(plan.apart) == (case == "differ")


def test_one_storage_under_two_names(tmp_path: Path) -> None:
    """As ``.bin`` files have tied tensors."""
    cls, state, config = build("LlamaForCausalLM")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config.save_pretrained(tmp_path / "source")
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    assert not assert_as_library(tmp_path / "source", cls).apart


def test_what_differs_only_before_the_cast_is_one(tmp_path: Path) -> None:
    cls, state, config = build("LlamaForCausalLM")
    state = {key: value.float() for key, value in state.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1 + 2**-16)
    folder = save(tmp_path / "source", config, state)
    assert not assert_as_library(folder, cls).apart
    for dtype in ("float32", "auto"):
        assert planned(folder, dtype=dtype).apart == (("lm_head.weight", "model.embed_tokens.weight"),)


def test_a_head_that_differs_is_not_quantized_as_the_library_could_not_compare_it(tmp_path: Path) -> None:
    _, state, config = build("LlamaForCausalLM")
    folder = save(tmp_path / "source", config, differ(state, "lm_head.weight"))
    reasons = {tensor.name: tensor.reason or "" for tensor in planned(folder, default_skips=False).tensors}
    assert "the library compares it with model.embed_tokens.weight when it opens the model" in reasons["lm_head.weight"]
    untied = planned(folder, default_skips=False, untie=True)
    assert not untied.apart
    assert {tensor.action for tensor in untied.tensors if tensor.name == "lm_head.weight"} == {"quantize"}


def test_what_a_class_makes_itself_is_not_missing(tmp_path: Path) -> None:
    """Marian's position tables, which transformers does not save."""
    cls, state, config = build("MarianMTModel")
    model = cls(config).bfloat16()
    model.save_pretrained(tmp_path / "source")
    plan = assert_as_library(tmp_path / "source", cls)
    assert {item.name for item in plan.missing} == {name for name in state if "embed_positions" in name}


def _llama(folder: Path, change: Callable[[State], None], **extra: torch.Tensor) -> tuple[Any, Path]:
    cls, state, config = build("LlamaForCausalLM")
    del state["lm_head.weight"]
    state |= extra
    change(state)
    return cls, save(folder, config, state)


def test_missing_tensors_are_refused_and_can_be_left_to_the_library(tmp_path: Path) -> None:
    gone = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    cls, folder = _llama(tmp_path / "source", lambda state: [state.pop(name) for name in gone] and None)
    with pytest.raises(PlanError) as caught:
        planned(folder)
    assert caught.value.problems[0].startswith(f"LlamaForCausalLM: the checkpoint does not hold {', '.join(gone)} (")
    for patterns in (gone, ("re:model\\.layers\\..*\\.mlp\\.up_proj", "model.norm")):
        plan = assert_as_library(folder, cls, allow_missing=patterns)
        assert {item.name for item in plan.missing} == set(gone)
        assert all("--allow-missing" in item.reason for item in plan.missing)
    with pytest.raises(PlanError) as caught:
        planned(folder, allow_missing=[*gone, "model.embed_tokens.weight"])
    assert [line[:61] for line in caught.value.problems] == [
        "--allow-missing 'model.embed_tokens.weight' matches nothing ("
    ] or "matches nothing" in caught.value.problems[0]


def test_a_shape_that_does_not_fit_is_refused_as_by_the_library(tmp_path: Path) -> None:
    cls, folder = _llama(tmp_path / "source", lambda s: s.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(RuntimeError):
        cls.from_pretrained(folder)
    with pytest.raises(PlanError) as caught:
        planned(folder)
    assert (
        "model.norm.weight has the shape [7] in model.safetensors, but its class expects [32]"
        in caught.value.problems[0]
    )


def test_tensors_that_the_class_does_not_know_are_carried(tmp_path: Path) -> None:
    cls, folder = _llama(tmp_path / "source", lambda _: None, **UNKNOWN)
    plan = assert_as_library(folder, cls)
    assert {tensor.name: tensor.bytes_out for tensor in plan.carried} == {k: v.nbytes for k, v in UNKNOWN.items()}
    assert all(tensor.file == "pytorch_model.bin" for tensor in plan.carried)
    dropping = planned(folder, drop_unknown=True)
    assert not dropping.carried
    assert {item.name for item in dropping.dropped} == UNKNOWN.keys()
    assert plan.totals.bytes_out - dropping.totals.bytes_out == sum(value.nbytes for value in UNKNOWN.values())
    assert plan.totals.quantized_fraction == dropping.totals.quantized_fraction


def test_what_is_not_a_tensor_does_not_hinder_and_is_said(tmp_path: Path) -> None:
    cls, state, config = build("LlamaForCausalLM")
    del state["lm_head.weight"]
    config.save_pretrained(tmp_path / "source")
    extra = {"layer._extra_state": None, "global_step": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    torch.save({**state, **extra}, tmp_path / "source" / "pytorch_model.bin")
    plan = assert_as_library(tmp_path / "source", cls)
    assert {item.name: item.reason for item in plan.dropped} == {
        "layer._extra_state": "None",
        "global_step": "a int, not a tensor",
        "optimizer": "a dict, not a tensor",
    }


def test_null_for_metadata_and_a_dtype_that_torch_lacks(tmp_path: Path) -> None:
    _, folder = _llama(tmp_path / "source", lambda _: None)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    data = raw[8 + size :]
    header["__metadata__"] = None
    header["packed"] = {"dtype": "F4", "shape": [2, 4], "data_offsets": [len(data), len(data) + 4]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(4))
    plan = planned(folder)
    assert [item.name for item in plan.dropped] == ["packed"]


def test_an_index_may_list_what_no_shard_holds(tmp_path: Path) -> None:
    """A tied tensor; one that is needed is missing all the same."""
    cls, folder = _llama(tmp_path / "source", lambda _: None)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with (folder / "model-00001-of-00001.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    places = dict.fromkeys([*header, "lm_head.weight"], "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_as_library(folder, cls)


@pytest.mark.parametrize("last", [True, False])
def test_of_two_shards_with_the_same_tensor_the_library_takes_the_last(last: bool, tmp_path: Path) -> None:
    cls, folder = _llama(tmp_path / "source", lambda _: None)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / one)
    save_file({"model.norm.weight": torch.full((32,), 7.0, dtype=torch.bfloat16)}, folder / two)
    with (folder / one).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    places = {**dict.fromkeys(header, one), "other": two}
    places["model.norm.weight"] = two if last else one
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if last:
        assert_as_library(folder, cls)
    else:
        with pytest.raises(aoconvert.errors.SourceError, match=r"'model\.norm\.weight' is in .*00001.* and in"):
            planned(folder)
