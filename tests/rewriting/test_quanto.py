"""Weights by optimum-quanto 0.2.7: real files, and the values that Quanto itself computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bits import bits
from safetensors.torch import load_file

from aoconvert.formats.torch_bin.contents import BinTensor, StoredData
from aoconvert.rewriting.migrate_types import CannotMigrate
from aoconvert.rewriting.quanto.decide import QuantoTensors, collect, decide, dequantize, is_quanto
from aoconvert.schemes.tensors import repair

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy" / "quanto"
# the most that torchao's class is off, in steps of its scale, as measured
DEVIATION = {"int4": 0.12, "int2": 0.022}
CONVOLUTION = "pos_embed.proj.weight"


@dataclass(frozen=True)
class Stored:
    """Plain tensors as if a file held them."""

    data: Mapping[str, torch.Tensor]

    @property
    def described(self) -> dict[str, BinTensor]:
        return {
            name: BinTensor(
                "torch.Tensor",
                str(value.dtype).removeprefix("torch."),
                tuple(value.shape),
                StoredData(name, 0, value.nbytes, 0, value.stride()),
                {},
                {},
                False,
                "cpu",
            )
            for name, value in self.data.items()
        }

    def read(self, tensor: BinTensor) -> torch.Tensor:
        assert tensor.data is not None
        return self.data[tensor.data.storage].clone()


def opened(name: str) -> tuple[Stored, QuantoTensors, dict[str, torch.Tensor]]:
    """A folder's tensors, and Quanto's own values of those that are quantized."""
    stored = Stored(load_file(LEGACY / name / "diffusion_pytorch_model.safetensors"))
    truth = load_file(LEGACY / name / "dequant.safetensors")
    return stored, collect(stored.described, {key: tuple(value.shape) for key, value in truth.items()}), truth


def weights(found: QuantoTensors) -> dict[str, BinTensor]:
    return {name: tensor for name, tensor in found.tensors.items() if tensor.inner}


@pytest.mark.parametrize("name", sorted(path.name for path in LEGACY.iterdir()))
def test_every_weight_of_a_file(name: str) -> None:
    stored, found, truth = opened(name)
    assert is_quanto(stored.data)
    assert set(weights(found)) == set(truth)
    assert all(key.endswith(("input_scale", "output_scale")) for key in found.left_out)
    kind = name.partition("-")[2]
    for key, tensor in weights(found).items():
        assert torch.equal(bits(dequantize(tensor, stored.read)), bits(truth[key])), key
        made = decide(tensor, stored.read)
        values: Any = made.make(stored.read)
        assert made.is_carried == (key != CONVOLUTION)
        if made.is_carried:
            assert type(values).__name__ == {"int8": "Int8Tensor", "float8": "Float8Tensor"}.get(
                kind, "IntxUnpackedToInt8Tensor"
            )
            values = values.dequantize()
        if kind in DEVIATION and made.is_carried:
            assert made.reason is not None
            step = stored.read(tensor.inner["scale"]).float().reshape(len(values), -1, 1)
            off = (values.float() - truth[key].float()).abs().reshape(*step.shape[:2], -1)
            assert (off <= DEVIATION[kind] * step).all(), key
            values = decide(tensor, stored.read, exact=True).make(stored.read)
        assert torch.equal(bits(values), bits(truth[key])), key


@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_groups(kind: str) -> None:
    """The files tell the groups: 256 columns in two, 192 in two of 96, and 48 as a whole."""
    stored, found, _ = opened(f"diffusers-{kind}")
    schemes = {
        tensor.shape[1]: decide(tensor, stored.read).scheme.group_size  # type: ignore[union-attr]
        for tensor in weights(found).values()
    }
    assert schemes == {256: 128, 192: 96, 48: None, 32: None}


def packed(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Rows packed as Quanto packs them, also where they do not fill the last bytes."""
    per_byte = 8 // width
    rows = -(-len(codes) // per_byte)
    filled = torch.zeros(rows * per_byte, codes.shape[1], dtype=torch.uint8)
    filled[: len(codes)] = codes
    parts = filled.reshape(per_byte, rows, -1)
    return sum(parts[at] << (width * at) for at in range(per_byte))  # type: ignore[return-value]


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (1, 2), (3, 4), (3, 2), (5, 2), (7, 4)])
def test_rows_that_do_not_fill_a_byte(rows: int, width: int) -> None:
    codes = torch.randint(0, 2**width, (rows, 8), dtype=torch.uint8)
    scale, shift = torch.rand(rows, 1) + 0.1, torch.rand(rows, 1)
    data = {"w.weight._data._data": packed(codes, width), "w.weight._scale": scale, "w.weight._shift": shift}
    stored = Stored(data)
    found = collect(stored.described, {"w.weight": (rows, 8)}, {"w.weight": width})
    assert torch.equal(dequantize(found.tensors["w.weight"], stored.read), scale * codes - shift)
    made: Any = decide(found.tensors["w.weight"], stored.read).make(stored.read)
    assert torch.equal(made.qdata + 2 ** (width - 1), codes.to(torch.int8))
    assert torch.equal(made.scale, scale)


def test_a_row_of_zeros_in_float8() -> None:
    """Quanto gives it the scale 0 and codes that are no numbers; it is zeros again."""
    codes = torch.ones(2, 4).to(torch.float8_e4m3fn)
    codes[1] = torch.tensor(math.nan)
    stored = Stored({"w.weight._data": codes, "w.weight._scale": torch.tensor([[2.0], [0.0]])})
    tensor = collect(stored.described, {}).tensors["w.weight"]
    made: Any = decide(tensor, stored.read).make(stored.read)
    assert repair(made) == 1
    assert made.dequantize().tolist() == [[2.0] * 4, [0.0] * 4]


def test_groups_without_a_scale() -> None:
    """A group of one value has no step that a zero point could be counted in."""
    data = {
        "w.weight._data._data": torch.zeros(1, 8, dtype=torch.uint8),
        "w.weight._scale": torch.tensor([[0.0], [1.0]]),
        "w.weight._shift": torch.tensor([[-3.0], [0.0]]),
    }
    stored = Stored(data)
    made = decide(collect(stored.described, {"w.weight": (2, 8)}, {"w.weight": 4}).tensors["w.weight"], stored.read)
    assert not made.is_carried
    assert made.make(stored.read).tolist() == [[3.0] * 8, [0.0] * 8]


def test_what_is_not_whole_is_refused() -> None:
    stored, _, truth = opened("diffusers-int4")
    shapes = {key: tuple(value.shape) for key, value in truth.items()}
    name = "proj_out.weight"
    for part in ("_scale", "_shift"):
        rest = {key: value for key, value in stored.described.items() if key != f"{name}.{part}"}
        found = collect(rest, shapes)
        assert found.problems == (f"{name} has no {part} (download the checkpoint again: part of it is missing)",)
    [problem] = collect(stored.described, {key: shape for key, shape in shapes.items() if key != name}).problems
    assert problem.startswith(f"{name} is packed, and the model has no tensor of this name")
    wrong = collect(stored.described, {**shapes, name: (31, 48)})
    with pytest.raises(CannotMigrate, match="do not fit its shape"):
        decide(wrong.tensors[name], stored.read)
    wrong = collect(stored.described, shapes, {name: 2})
    with pytest.raises(CannotMigrate, match="do not fit its shape"):
        decide(wrong.tensors[name], stored.read)
    eight, _, _ = opened("diffusers-int8")
    [problem] = collect(eight.described, {name: (1, 2)}).problems
    assert problem.startswith(f"{name} has the shape (32, 48), but the model's is (1, 2)")


def test_one_row_of_unknown_width() -> None:
    """Without the map nothing tells 4 bits from 2 where all rows are in one row of bytes."""
    data = {
        "w.weight._data._data": torch.zeros(1, 8, dtype=torch.uint8),
        "w.weight._scale": torch.ones(1, 1),
        "w.weight._shift": torch.ones(1, 1),
    }
    stored = Stored(data)
    with pytest.raises(CannotMigrate, match="whether it has 4 or 2 bits") as caught:
        decide(collect(stored.described, {"w.weight": (1, 8)}).tensors["w.weight"], stored.read)
    assert caught.value.hint == "add the quanto_qmap.json it lacks"
