"""What an error in a weight does to the model's output: foretold from gradients, and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.evaluating import Line, asked, build_model

import aoconvert
from aoconvert.checkpoint.evaluation import ComponentFigures, LayerFigures, Metrics
from aoconvert.evaluation.children import sensitivity
from aoconvert.evaluation.children.passes import compare, run_sample
from aoconvert.evaluation.children.sensitivity import measure_sensitivity
from aoconvert.searching.sensitivity import _ratios, read_sensitivity

__all__ = ["asked"]

_SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, num_key_value_heads=2))


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**_SIZES))


def mixtral() -> Any:
    config = transformers.MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def spread(model: Any) -> Any:
    """Weights as large as those of a trained model."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5
    return model.eval()


def measured(model: Any, task: str, sample: dict[str, Any], name: str, draws: int = 24, size: float = 0.02) -> float:
    """The mean loss by noise in one weight, for each unit of its squared relative error."""
    weight = model.get_parameter(name if name in dict(model.named_parameters()) else f"{name}.weight")
    kept, before, losses = weight.data, run_sample(model, task, sample), []
    for seed in range(draws):
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed))
        weight.data = kept + size * float(kept.square().mean().sqrt()) * noise
        found = compare(task, before, run_sample(model, task, sample).output)
        losses.append(found.noise / found.signal if task == "encoder" else sum(found.kl) / len(found.kl))
    weight.data = kept
    return sum(losses) / draws / size**2


@pytest.mark.parametrize(("build", "task"), [(llama, "causal-lm"), (bert, "encoder")])
def test_it_foretells_what_noise_does(build: Any, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many draws the two agree within a quarter; the few that an evaluation takes are within a factor of two."""
    model = spread(build())
    sample = {"input_ids": torch.randint(48, (1, 24), generator=torch.Generator().manual_seed(1))}
    few = measure_sensitivity(model, task, sample, 1)
    monkeypatch.setattr(sensitivity, "_DRAWS", 200)
    many = measure_sensitivity(model, task, sample, 1)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert set(many) == set(few) == set(names) - {"pooler.dense"}  # nothing that is compared comes from that
    for name in list(many)[::4]:
        loss = measured(model, task, sample, name)
        assert many[name] == pytest.approx(loss, rel=0.25), name
        assert loss / 2 < few[name] < loss * 2, name
    assert max(many.values()) > 2 * min(many.values())


def test_stacked_experts_are_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(mixtral())
    sample = {"input_ids": torch.randint(48, (1, 24), generator=torch.Generator().manual_seed(1))}
    monkeypatch.setattr(sensitivity, "_DRAWS", 100)
    found = measure_sensitivity(model, "causal-lm", sample, 1)
    stacks = [name for name, value in model.named_parameters() if value.dim() == 3]
    assert len(stacks) == 4 and set(stacks) < set(found)
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())
    for name in stacks:  # noise that is small enough to send no token to another expert
        assert found[name] == pytest.approx(measured(model, "causal-lm", sample, name, size=0.002), rel=0.2), name
    monkeypatch.setattr(sensitivity, "available_memory", lambda: 8 * 1000)
    assert not set(stacks) & set(measure_sensitivity(model, "causal-lm", sample, 1))  # no room for their gradients


def test_a_gradient_is_the_same_whether_made_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few rows the gradient of a weight is never made; a layer that is called twice counts with both calls."""
    model = spread(llama())
    model.model.layers[1].mlp = model.model.layers[0].mlp
    sample = {"input_ids": torch.randint(48, (1, 24), generator=torch.Generator().manual_seed(1))}
    few = measure_sensitivity(model, "causal-lm", sample, 1)
    weight = model.model.layers[0].mlp.up_proj.weight
    draw = torch.Generator().manual_seed(1)
    weight.requires_grad_(True)
    total = 0.0
    for _ in range(4):
        weight.grad = None
        chances = torch.log_softmax(model(**sample).logits[0, :-1], -1)
        chances.gather(1, torch.multinomial(chances.detach().exp(), 1, generator=draw)).sum().backward()
        total += float(weight.grad.square().sum())
    assert few["model.layers.0.mlp.up_proj"] == pytest.approx(
        total / 8 / 23 * float(weight.detach().square().mean()), rel=1e-3
    )


def test_layers_of_which_it_is_not_known_are_in_the_same_unit() -> None:
    """A stack of experts may have the error of its outputs alone: as large as that, by the others' median."""

    def layer(name: str, output: float, known: float | None) -> LayerFigures:
        return LayerFigures(name=name, output_sqnr_db=output, weight_sqnr_db=40.0, sensitivity=known)

    layers = (layer("a", 40.0, 2.0), layer("b", 30.0, 40.0), layer("c", 40.0, 6.0), layer("experts", 30.0, None))
    part = ComponentFigures(
        name="", class_name="M", task="causal-lm", metrics=Metrics(), noise_floor=Metrics(), layers=layers
    )
    assert _ratios(part) == pytest.approx({"a": 2.0, "b": 40.0, "c": 6.0, "experts": 40.0})
    alone = part.model_copy(update={"layers": layers[3:]})
    assert _ratios(alone) == pytest.approx({"experts": 10.0})


def test_it_is_in_the_report_or_named(asked: list[Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_model(llama(), tmp_path / "model")
    result = aoconvert.quantize(source, "int8wo", device="cpu", output=tmp_path / "out", min_quantized=0.0).output
    options: dict[str, Any] = {"source": str(source), "samples": 2, "tokens": 24, "noise_floor": False}
    [part] = aoconvert.evaluate(result, **options).components
    assert part.layers and all(layer.sensitivity and layer.sensitivity > 0 for layer in part.layers)
    assert not part.skipped_figures
    found = read_sensitivity(result / "aoconvert.eval.json")
    assert found == {("", layer.name): layer.sensitivity for layer in part.layers}

    def fail(*_: Any) -> Any:
        raise NotImplementedError("no backward pass\nmore")

    monkeypatch.setattr(sensitivity, "give_sample", fail)
    [part] = aoconvert.evaluate(result, **options, seed=2).components
    assert part.layers and not any(layer.sensitivity for layer in part.layers)
    [skipped] = part.skipped_figures
    assert (skipped.name, skipped.reason) == ("sensitivity", "NotImplementedError: no backward pass")
