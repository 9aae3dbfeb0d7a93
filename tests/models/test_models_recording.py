"""What a function does with tensors is written down without data, and done again with it, in any rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from aoconvert.models.base import Rows, SourceTensor
from aoconvert.models.recording import CannotRecord, Replay, record

Tensors = dict[str, Any]

DATA = {
    "matrix": torch.randn(12, 6),
    "kernel": torch.randn(12, 6, 1, 1),
    "vector": torch.randn(12),
    "nested": torch.randn(1, 12, 1, 1),
    "square": torch.randn(5, 4, 4),
}
SOURCES = {
    name: SourceTensor("f.safetensors", name, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
    for name, tensor in DATA.items()
}


def load(source: SourceTensor, rows: Rows | None) -> torch.Tensor:
    tensor = DATA[source.name]
    return tensor if rows is None else tensor[rows[0] : rows[1]]


IN_ROWS: Mapping[str, Callable[[Tensors], Any]] = {
    "as it is": lambda t: t["matrix"],
    "chunk": lambda t: torch.cat([t["matrix"].chunk(3)[1]]),
    "swapped halves": lambda t: torch.cat(t["matrix"].chunk(2)[::-1], dim=0),
    "vector": lambda t: torch.cat(t["vector"].chunk(2)[::-1]),
    "unequal parts": lambda t: torch.split(t["matrix"], (3, 4, 5), dim=0)[2][1:4],
    "uneven last part": lambda t: t["matrix"].split(5)[2],
    "from the end": lambda t: t["matrix"][-3:],
    "columns": lambda t: t["matrix"][:, 2:4],
    "part of the columns": lambda t: t["matrix"].split(2, dim=1)[1],
    "side by side": lambda t: torch.cat([t["matrix"], t["matrix"]], dim=-1),
    "a kernel of one": lambda t: t["kernel"][:, :, 0, 0],
    "squeezed": lambda t: t["kernel"].squeeze(-1).squeeze(-1),
    "unsqueezed": lambda t: t["matrix"].unsqueeze(1),
    "reshaped": lambda t: t["matrix"].reshape(12, 2, 3),
    "transposed within": lambda t: t["square"].transpose(1, -1).contiguous(),
    "permuted within": lambda t: t["square"].permute(0, 2, 1),
    "another dtype": lambda t: t["matrix"].half().clone(),
    "another device": lambda t: t["matrix"].to("cpu", torch.float64),
}
WHOLE: Mapping[str, Callable[[Tensors], Any]] = {
    "transposed": lambda t: t["matrix"].T.contiguous(),
    "other rows": lambda t: t["matrix"].reshape(24, 3),
    "stacked": lambda t: torch.stack(t["matrix"].chunk(3)),
    "every second": lambda t: t["matrix"][::2],
    "interleaved": lambda t: t["matrix"].view(3, 4, 6).permute(1, 0, 2).reshape(12, 6),
    "a row": lambda t: t["nested"][0, :, 0, 0],
    "arithmetic": lambda t: torch.cat([t["matrix"] * 2, t["matrix"]], dim=1),
}


@pytest.mark.parametrize("name", [*IN_ROWS, *WHOLE])
def test_the_same_is_done_again(name: str) -> None:
    function = {**IN_ROWS, **WHOLE}[name]
    expected: torch.Tensor = function(dict(DATA))
    step = record(lambda tensors: {"made": function(tensors)}, SOURCES)["made"]
    assert (step.shape, step.dtype) == (tuple(expected.shape), expected.dtype)
    assert step.streams is (name in IN_ROWS)
    replay = Replay(load)
    assert torch.equal(replay.make(step), expected)
    rows = expected.shape[0] if step.streams else 0
    for start in range(rows):
        for stop in range(start + 1, rows + 1):
            assert torch.equal(replay.make(step, (start, stop)), expected[start:stop])


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda t: t["matrix"] if t["vector"].sum() > 0 else t["square"], "looks at the values"),
        (lambda t: t["matrix"] * t["matrix"][0, 0].item(), "looks at the values"),
        (lambda t: t["matrix"].mul_(2), "in place"),
    ],
)
def test_what_depends_on_values_is_not_recorded(function: Callable[[Tensors], Any], why: str) -> None:
    with pytest.raises(CannotRecord, match=why):
        record(lambda tensors: {"made": function(tensors)}, SOURCES)


def test_a_mistake_stays_one() -> None:
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        record(lambda tensors: {"made": torch.split(tensors["matrix"], (1, 2))[0]}, SOURCES)


def test_what_is_only_renamed_is_the_stored_tensor() -> None:
    made = record(lambda tensors: {"new": tensors.pop("matrix"), **tensors}, SOURCES)
    assert made["new"].source == SOURCES["matrix"]
    assert set(made) == {"new", "kernel", "vector", "nested", "square"}
