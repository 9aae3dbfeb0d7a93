"""The plan has what the library has when it opens the same checkpoint: every tensor, every tie, and what it misses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from safetensors.torch import save_file

import aoconvert
from aoconvert.errors import PlanError
from aoconvert.formats.sharded import open_reader
from aoconvert.planning.types import ComponentPlan

T: Any = tiny.transformers
State = dict[str, torch.Tensor]
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
_LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
_BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
_BART |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_OPT |= {"max_position_embeddings": 32, "word_embed_proj_dim": 32}


def _gemma3() -> Any:
    text = {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return T.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )


MODELS: Mapping[str, Callable[[], Any]] = {
    "T5ForConditionalGeneration": lambda: T.T5Config(**_T5),
    "T5ForConditionalGeneration v1.1": lambda: T.T5Config(
        **_T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"
    ),
    "MT5ForConditionalGeneration": lambda: T.MT5Config(**_T5, tie_word_embeddings=False),
    "UMT5ForConditionalGeneration": lambda: T.UMT5Config(**_T5, tie_word_embeddings=False),
    "UMT5EncoderModel": lambda: T.UMT5Config(**_T5),
    "BartForConditionalGeneration": lambda: T.BartConfig(**_BART),
    "OPTForCausalLM": lambda: T.OPTConfig(**_OPT),
    "GPTNeoForCausalLM": lambda: T.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]
    ),
    "LlamaForCausalLM": lambda: T.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "BertForMaskedLM": lambda: T.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ),
    "Gemma3ForConditionalGeneration": _gemma3,
    "MarianMTModel": lambda: T.MarianConfig(**_BART, max_position_embeddings=16, pad_token_id=0),
}


def built(name: str, **extra: State) -> tuple[Any, State, Any]:
    """The class, a model's tensors under all its names, each its own, and its config."""
    cls = getattr(T, name.split()[0])
    config = MODELS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).bfloat16()
    config.architectures = [cls.__name__]
    return cls, {key: value.clone() for key, value in model.state_dict().items()}, config


def save(folder: Path, config: Any, state: State) -> Path:
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def planned(folder: Path, **options: Any) -> ComponentPlan:
    made = aoconvert.plan(folder, "int8wo", output=folder.parent / "out", device="cpu", min_quantized=0.0, **options)
    [component] = made.components
    return component


def assert_as_library(folder: Path, cls: Any, **options: Any) -> ComponentPlan:
    """Every parameter and buffer of the opened model is the one that the plan reads, and the same ones are tied."""
    model, report = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    plan = planned(folder, **options)
    names = {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)}
    wanted = model.state_dict()
    ties = {spec.name: spec.tied_to for spec in plan.skeleton if spec.tied_to}
    written = {tensor.name: tensor for tensor in plan.tensors if tensor.action != "tied"}
    left = {item.name for item in plan.missing}
    assert {tensor.name for tensor in plan.tensors if tensor.action != "carry"} | left == set(wanted)
    for name, value in wanted.items():
        if name in left:
            continue
        place = ties.get(name, name)
        assert names.get(name) == names.get(place)
        tensor = written[place]
        assert tensor.origin is not None
        reader = open_reader(folder / tensor.origin[0])
        assert torch.equal(reader.read(tensor.origin[1]).to(value.dtype), value), name
        reader.close()
    apart = [name for name in written if name in names]
    assert len({names[name] for name in apart}) == len(apart)
    assert report["missing_keys"] <= left
    return plan


def differ(state: State, *names: str) -> State:
    """The same checkpoint, in which these tensors differ from each other."""
    return {key: value + (1 + names.index(key)) if key in names else value for key, value in state.items()}


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
    cls, state, config = built(name)
    table = state["shared.weight"]
    state |= {key: table.clone() for key in _ALL}
    for key in set(_ALL) - set(there):
        del state[key]
    plan = assert_as_library(save(tmp_path / "source", config, differ(state, *differing)), cls)
    assert len(plan.apart) == apart


@pytest.mark.parametrize("name", [name for name in MODELS if "T5" not in name and name != "MarianMTModel"])
@pytest.mark.parametrize("case", _mostly(["both", "differ", "only the first", "only the second"], "differ"))
def test_every_declared_tie(name: str, case: str, tmp_path: Path) -> None:
    cls, state, config = built(name)
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
    cls, state, config = built("LlamaForCausalLM")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config.save_pretrained(tmp_path / "source")
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    assert not assert_as_library(tmp_path / "source", cls).apart


def test_what_differs_only_before_the_cast_is_one(tmp_path: Path) -> None:
    cls, state, config = built("LlamaForCausalLM")
    state = {key: value.float() for key, value in state.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1 + 2**-16)
    folder = save(tmp_path / "source", config, state)
    assert not assert_as_library(folder, cls).apart
    for dtype in ("float32", "auto"):
        assert planned(folder, dtype=dtype).apart == (("lm_head.weight", "model.embed_tokens.weight"),)


def test_a_head_that_differs_is_not_quantized_as_the_library_could_not_compare_it(tmp_path: Path) -> None:
    _, state, config = built("LlamaForCausalLM")
    folder = save(tmp_path / "source", config, differ(state, "lm_head.weight"))
    reasons = {tensor.name: tensor.reason or "" for tensor in planned(folder, default_skips=False).tensors}
    assert "is compared with model.embed_tokens.weight when the model is opened" in reasons["lm_head.weight"]
    untied = planned(folder, default_skips=False, untie=True)
    assert not untied.apart
    assert {tensor.action for tensor in untied.tensors if tensor.name == "lm_head.weight"} == {"quantize"}


def test_what_a_class_makes_itself_is_not_missing(tmp_path: Path) -> None:
    """Marian's position tables, which transformers does not save."""
    cls, state, config = built("MarianMTModel")
    model = cls(config).bfloat16()
    model.save_pretrained(tmp_path / "source")
    plan = assert_as_library(tmp_path / "source", cls)
    assert {item.name for item in plan.missing} == {name for name in state if "embed_positions" in name}


def _llama(folder: Path, change: Callable[[State], None], **extra: torch.Tensor) -> tuple[Any, Path]:
    cls, state, config = built("LlamaForCausalLM")
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
    assert "model.norm.weight is [7] in model.safetensors, but its class wants [32]" in caught.value.problems[0]


UNKNOWN: State = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.embeddings.position_ids": torch.arange(4),
    "mtp.layers.0.weight": torch.ones(4, 4, dtype=torch.bfloat16),
    "model.layers.0.self_attn._extra_state": torch.zeros(3, dtype=torch.uint8),
    "spectrum": torch.ones(2, dtype=torch.complex64),
}


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
    cls, state, config = built("LlamaForCausalLM")
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
