"""``config.json``: the torchao config that says what was decided, and both libraries reading it back."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from helpers import tiny
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from aoconvert import schemes
from aoconvert.engine.model_config import model_config, quantization_config
from aoconvert.recipes import fqn_to_config
from aoconvert.recipes.rules import Rules

LIBRARIES = ("diffusers", "transformers")


def quantization_class(library: str) -> Any:
    return (tiny.diffusers if library == "diffusers" else tiny.transformers).TorchAoConfig


def mixtral() -> nn.Module:
    config = tiny.transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    with init_empty_weights():
        return tiny.transformers.MixtralForCausalLM(config).bfloat16()


def opt() -> nn.Module:
    """Its linear layers have biases, its norms too."""
    config = tiny.transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    )
    config.tie_word_embeddings = False
    with init_empty_weights():
        return tiny.transformers.OPTForCausalLM(config).bfloat16()


def flux() -> nn.Module:
    """``to_out.1`` is a Dropout, ``net.1`` too: modules without a tensor, which no pattern may match."""
    with init_empty_weights():
        return tiny.flux_transformer().bfloat16()


def linear_weights(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def outcome(model: nn.Module) -> dict[str, Any]:
    """Class, dtypes and blocks of every quantized tensor."""
    found = {}
    for name, tensor in model.state_dict().items():
        if type(tensor) is not torch.Tensor:
            names, context = tensor.__tensor_flatten__()
            inner = [(key, getattr(tensor, key).dtype, getattr(tensor, key).shape) for key in names]
            found[name] = (type(tensor).__name__, inner, str(context))
    return found


def expected(decided: Mapping[str, schemes.Scheme | None], model: nn.Module) -> dict[str, Any]:
    from aoconvert.schemes.apply import quantize_weight

    holder = nn.Module()
    state = model.state_dict()
    wrapped = {}
    for index, (name, scheme) in enumerate(decided.items()):
        if scheme is not None:
            setattr(holder, f"p{index}", nn.Parameter(quantize_weight(state[name], scheme), requires_grad=False))
            wrapped[f"p{index}"] = name
    return {wrapped[key]: value for key, value in outcome(holder).items()}


@pytest.mark.parametrize("build", [mixtral, opt, flux])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 9))])
def test_torchao_makes_of_the_recorded_config_what_was_decided(build: Any, seed: int) -> None:
    chosen = [schemes.get("int8wo"), schemes.get("float8wo", group_size=16), schemes.get("intx4wo"), None, None]
    model = build()
    rng = random.Random(seed)
    decided: dict[str, schemes.Scheme | None] = {}
    linear = linear_weights(model)
    for name, tensor in model.state_dict().items():
        by_kind = {"embed": name.endswith("embed_tokens.weight"), "stacked": tensor.dim() == 3 and "experts" in name}
        options = (
            chosen if name in linear or by_kind["embed"] else [*chosen[:2], None] if by_kind["stacked"] else [None]
        )
        decided[name] = rng.choice(options)
    config = fqn_to_config(Rules((), schemes.get("int8wo")), decided, linear)
    assert isinstance(config, FqnToConfig)
    wanted = expected(decided, model)
    assert wanted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, config, filter_fn=None)
    assert outcome(model) == wanted


def test_one_scheme_for_linear_layers_is_a_plain_config() -> None:
    int8, float8 = schemes.get("int8wo"), schemes.get("float8wo")
    linear = ["a.weight", "b.weight"]
    decided: dict[str, schemes.Scheme | None] = {"a.weight": int8, "b.weight": None, "a.bias": None}
    assert fqn_to_config(Rules((), int8), decided, linear) is int8.config
    for rules, extra in (
        (Rules((), None), {}),  # the default is for nothing
        (Rules((), float8), {}),  # the default went nowhere
        (Rules((), int8), {"b.weight": float8}),
        (Rules((), int8), {"experts.up": int8}),
        (Rules((), int8), {"embed.weight": int8}),
    ):
        config = fqn_to_config(rules, {**decided, **extra}, linear)
        names = {name.removesuffix(".weight") for name in ("a.weight", *extra)}
        assert isinstance(config, FqnToConfig)
        assert set(config.fqn_to_config) == names


def test_layers_are_told_in_few_patterns() -> None:
    model = mixtral()
    int8, float8 = schemes.get("int8wo"), schemes.get("float8wo")
    decided: dict[str, schemes.Scheme | None] = {
        name: float8 if name.endswith("v_proj.weight") else int8 for name in linear_weights(model) if "layers" in name
    }
    config = fqn_to_config(Rules((), int8), decided, linear_weights(model))
    assert list(config.fqn_to_config) == [
        r"re:model\.layers\.(?:0|1|2)\.self_attn\.(?:q_proj|k_proj|o_proj)",
        r"re:model\.layers\.(?:0|1|2)\.self_attn\.v_proj",
    ]


def available() -> list[str]:
    return [entry.name for entry in schemes.catalogue() if schemes.availability(entry) is None]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["int8wo", "int4wo", "float8dq_row"])
def test_the_library_reads_the_config_back(library: str, name: str) -> None:
    both_forms_are_read_back(library, name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", available())
def test_the_library_reads_the_config_of_every_scheme_back(library: str, name: str) -> None:
    both_forms_are_read_back(library, name)


def both_forms_are_read_back(library: str, name: str) -> None:
    scheme, other = schemes.get(name), schemes.get("int8wo")
    linear = ["a.0.weight", "a.1.weight", "b.weight"]
    plain = fqn_to_config(Rules((), scheme), dict.fromkeys(linear, scheme), linear)
    mixed = fqn_to_config(Rules((), None), {"a.0.weight": scheme, "a.1.weight": scheme, "b.weight": other}, linear)
    for config, skipped in ((plain, ["c"]), (mixed, [])):
        text = model_config(library, {"hidden": 3}, quantization_config(library, config, ["c"]), "bfloat16")
        values = json.loads(text)["quantization_config"]
        assert values["modules_to_not_convert"] == skipped
        back = quantization_class(library).from_dict(values)
        assert back.quant_type == config
        assert back.to_dict() == values


def test_the_dtype_is_transformers_key_alone() -> None:
    source = {"torch_dtype": "float16", "hidden": 3}
    assert json.loads(model_config("transformers", source, {}, "bfloat16")) == {
        "hidden": 3,
        "dtype": "bfloat16",
        "quantization_config": {},
    }
    assert "dtype" not in json.loads(model_config("diffusers", {"hidden": 3}, {}, "bfloat16"))
    assert "dtype" not in json.loads(model_config("transformers", source, {}, "auto"))
