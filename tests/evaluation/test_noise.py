"""The noise floor: noise with the power of bfloat16 rounding, in one module at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aoconvert.evaluation.children.noise import add_rounding_noise, rounding_noise


def test_a_float32_weight_is_rounded_to_bfloat16() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    noisy = add_rounding_noise(weight, "layer", 1)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, weight.bfloat16().float())


def test_a_bfloat16_weight_takes_noise_of_the_power_of_rounding() -> None:
    """One step at most, up as often as down, with a variance of step²/12."""
    weight = torch.full((1200, 1000), 1.5).bfloat16()  # a step is 2**-7 here
    error = (add_rounding_noise(weight, "layer", 1).double() - weight.double()) * 2**7
    assert set(error.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert float(error.square().mean()) == pytest.approx(1 / 12, rel=0.02)
    assert float(error.mean()) == pytest.approx(0, abs=1e-3)


def test_the_ends_of_the_range_stay() -> None:
    ends = torch.tensor([0.0, -0.0, torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]).bfloat16()
    weight = ends.repeat(100_000).reshape(400, 1000)
    assert torch.equal(add_rounding_noise(weight, "layer", 1).view(torch.int16), weight.view(torch.int16))


def test_the_same_name_and_seed_give_the_same_noise() -> None:
    weight = torch.full((100, 100), 1.5).bfloat16()
    assert torch.equal(add_rounding_noise(weight, "a", 1), add_rounding_noise(weight, "a", 1))
    assert not torch.equal(add_rounding_noise(weight, "a", 1), add_rounding_noise(weight, "b", 1))
    assert not torch.equal(add_rounding_noise(weight, "a", 1), add_rounding_noise(weight, "a", 2))


def test_a_module_runs_with_it_and_is_as_before_afterwards() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.LayerNorm(64)).bfloat16()
    ids, before = torch.arange(10), {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(ids)
    with rounding_noise(model, 1):
        noisy = model(ids)
    expected = nn.functional.linear(
        before["0.weight"], add_rounding_noise(before["1.weight"], "1.weight", 1), before["1.bias"]
    )
    assert torch.equal(noisy, model[2](expected))
    assert not torch.equal(noisy, plain)
    assert torch.equal(model(ids), plain)
    with pytest.raises(IndexError), rounding_noise(model, 1):
        model(torch.tensor([10]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
