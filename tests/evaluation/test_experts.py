"""The output error of stacks of experts: on the rows that a mixture routes to each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.evaluating import Line, asked, build_model
from safetensors.torch import save_file
from torch.nn.functional import linear

import aoconvert
from aoconvert.checkpoint import manifest
from aoconvert.evaluation.children.experts import choose_rows
from aoconvert.evaluation.children.layers import Captured, capture_inputs, measure_layers

__all__ = ["asked"]

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MORE = {"num_key_value_heads": 2, "head_dim": 8}


def mixtral() -> Any:
    config = transformers.MixtralConfig(**_SIZES, num_key_value_heads=2, intermediate_size=64, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **_SIZES, **_MORE, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, decoder_sparse_step=1
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> Any:
    """Its matrices are (in, out), and as wide as high in the down projection."""
    config = transformers.GptOssConfig(**_SIZES, **_MORE, num_local_experts=4, intermediate_size=32)
    return transformers.GptOssForCausalLM(config)


def products(model: Any, tokens: torch.Tensor) -> Iterator[tuple[str, int, torch.Tensor]]:
    """What each expert of Mixtral or Qwen3-MoE multiplies, from what the library hands to its module."""
    given: dict[str, Any] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args}))
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    for name, (hidden, chosen, _) in given.items():
        module = model.get_submodule(name)
        for expert in range(module.num_experts):
            rows = hidden[(chosen == expert).any(-1)]
            gate, up = linear(rows, module.gate_up_proj[expert]).chunk(2, -1)
            yield f"{name}.gate_up_proj", expert, rows
            yield f"{name}.down_proj", expert, module.act_fn(gate) * up


def capture(model: Any, tokens: torch.Tensor, most: int) -> Captured:
    with torch.no_grad():
        before = model(tokens).logits
        with capture_inputs(model, most) as captured:
            after = model(tokens).logits
        assert torch.equal(before, after)  # who listens changes nothing
        assert torch.equal(before, model(tokens).logits)
    return captured


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_the_rows_are_those_of_each_expert(build: Any, way: str, tmp_path: Path) -> None:
    """The figure is the one of all rows that the original multiplies, whichever way transformers does it."""
    torch.manual_seed(0)
    model = build().bfloat16().eval().requires_grad_(False)
    model.set_experts_implementation(way)
    tokens = torch.randint(64, (1, 40))
    captured = capture(model, tokens, 10_000)
    file = tmp_path / "rows.safetensors"
    save_file(captured.tensors(model), file, captured.metadata())
    stacks = {name: value.data for name, value in model.named_parameters() if value.dim() == 3}
    other = {name: value + 0.01 * torch.randn_like(value) for name, value in stacks.items()}
    sums = {name: [0.0, 0.0] for name in stacks}
    for name, expert, rows in products(model, tokens):
        before, after = (rows.double() @ values[name][expert].double().T for values in (stacks, other))
        sums[name][0] += float(before.square().sum())
        sums[name][1] += float((before - after).square().sum())
    for name, value in other.items():
        model.get_parameter(name).data = value
    found = {line["name"]: line for line in measure_layers(model, [file], dict.fromkeys(stacks))}
    assert set(found) == set(stacks) and len(stacks) == 4
    for name, (signal, noise) in sums.items():
        assert found[name]["output_sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-3), name


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_matrices_that_lie_the_other_way_round(way: str) -> None:
    torch.manual_seed(0)
    model = gpt_oss().bfloat16().eval().requires_grad_(False)
    model.set_experts_implementation(way)
    captured = capture(model, torch.randint(64, (1, 20)), 12)
    tensors = captured.tensors(model)
    assert captured.transposed == {name for name, value in model.named_parameters() if name.endswith("_proj")}
    for name in captured.transposed:
        place = captured.places[name]
        rows, experts = tensors[f"inputs.{place}"].float(), tensors[f"experts.{place}"]
        stack = model.get_parameter(name).float()
        wanted = torch.stack([row @ stack[expert] for row, expert in zip(rows, experts.tolist(), strict=True)])
        assert torch.allclose(tensors[f"outputs.{name}"], wanted, atol=1e-5)


def test_what_is_multiplied_in_another_way_is_named(tmp_path: Path) -> None:
    """transformers' ``batched_mm`` copies a matrix for each row: which expert it is of cannot be seen."""
    model = mixtral().eval()
    model.set_experts_implementation("batched_mm")
    captured = capture(model, torch.randint(64, (1, 8)), 10)
    file = tmp_path / "rows.safetensors"
    save_file(captured.tensors(model), file, captured.metadata())
    name = "model.layers.0.mlp.experts.down_proj"
    assert [*measure_layers(model, [file], {name: None})] == [
        {"name": name, "reason": "it was not run on these inputs, or it multiplies its experts in an unknown way"}
    ]


def test_each_expert_has_rows() -> None:
    rows = [(expert, torch.full((count, 2), float(expert))) for expert, count in ((3, 60), (0, 2), (1, 38))]
    chosen, experts = choose_rows(rows, 10)
    assert experts.tolist() == [3] * 6 + [0] + [1] * 3
    assert chosen[:, 0].tolist() == experts.tolist()
    assert len(choose_rows(rows, 1)[0]) == 3 and len(choose_rows(rows, 1000)[0]) == 100


def test_experts_are_in_the_report(asked: list[Line], tmp_path: Path) -> None:
    source = build_model(mixtral(), tmp_path / "model")
    result = aoconvert.quantize(source, "int8wo", device="cpu", output=tmp_path / "out", min_quantized=0.0).output
    report = aoconvert.evaluate(result, source=str(source), samples=2, tokens=24, noise_floor=False)
    [part] = report.components
    stacks = {layer.name: layer for layer in part.layers if ".experts." in layer.name}
    assert len(stacks) == 4 and not any(".experts." in layer.name for layer in part.skipped_layers)
    entries = {tensor.name: tensor for tensor in manifest.load(result).components[0].tensors}
    for name, layer in stacks.items():
        assert layer.weight_sqnr_db == entries[name].sqnr_db
        # an int8 weight has an error of outputs like its own
        assert layer.output_sqnr_db == pytest.approx(layer.weight_sqnr_db, abs=3)
    picture = aoconvert.card(result).picture
    assert picture is not None and f"{len(part.layers)} of their outputs" in picture
