"""The output error of a layer: ‖XW−XŴ‖/‖XW‖ on rows that the original saw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from aoconvert.evaluation.children import layers
from aoconvert.evaluation.children.layers import capture_inputs, measure_layers, multiply


class Twins(nn.Module):
    """Two layers that share their input, and a third that has what they give; one is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out, self.idle = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, given: torch.Tensor) -> Any:
        return self.out(torch.relu(self.q(given)) + self.k(given))


def test_rows_of_an_input_are_kept_once() -> None:
    model, given = Twins(), torch.randn(2, 50, 32)
    with capture_inputs(model, 10) as captured:
        model(given)
    model(given)  # nothing listens any more
    assert captured.places == {"q": 0, "k": 0, "out": 1}
    assert [rows.shape for rows in captured.rows] == [(10, 32), (10, 32)]
    assert torch.equal(captured.rows[0], given.reshape(-1, 32)[[0, 11, 22, 33, 44, 55, 66, 77, 88, 99]])
    with capture_inputs(model, 1000) as all_of_them:
        model(given)
    assert len(all_of_them.rows[0]) == 100


def test_the_error_is_that_of_the_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twins().bfloat16()
    weights = {name: module.weight.detach().clone() for name, module in model.named_children()}
    files, rows = [], []
    for number in range(2):
        with torch.no_grad(), capture_inputs(model, 20) as captured:
            model(torch.randn(1, 40, 32).bfloat16())
            files.append(tmp_path / f"{number}.safetensors")
            save_file(captured.tensors(model), files[-1], captured.metadata())
        rows.append(captured.rows[1].double())
    quantize_(model, Int8WeightOnlyConfig(version=2))
    wanted = dict.fromkeys(["q.weight", "k.weight", "out.weight", "idle.weight", "nowhere.weight"])
    found = {line.pop("name"): line for line in measure_layers(model, files, wanted)}
    before = torch.cat(rows) @ weights["out"].double().T
    error = before - torch.cat(rows) @ model.out.weight.dequantize().double().T
    assert found["out"]["output_sqnr_db"] == pytest.approx(
        20 * math.log10(float(before.norm() / error.norm())), abs=1e-4
    )
    assert found["idle"]["reason"] == "it was not run on these inputs"
    assert found["nowhere"]["reason"] == "it is not the weight of a linear layer of its own"
    assert set(found) == {"q", "k", "out", "idle", "nowhere"}


def test_a_large_weight_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = torch.randn(5, 16).bfloat16(), torch.randn(70, 16).bfloat16()
    monkeypatch.setattr(layers, "_AT_ONCE", 100)
    assert torch.allclose(multiply(rows, weight), rows.float() @ weight.float().T, rtol=1e-5)
