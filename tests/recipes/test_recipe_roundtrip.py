"""A recipe's result can be loaded by its library, and quantizing again from what it records gives the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from recipe_toml import dump

import aoconvert
from aoconvert.recipes import load

# what differs between two runs, or names the recipe's file
NOT_COMPARED = {"aoconvert.json", "README.md"}

RECIPES = {
    "mixtral": r"""
        [[rule]]
        match = 're:.*\.self_attn\.[qk]_proj'
        scheme = "int8wo"

        [[rule]]
        match = 're:.*\.experts\..*'
        scheme = "float8wo"

        [[rule]]
        match = "model.layers.0.self_attn.v_proj"
        scheme = "intx4wo"
        group_size = 16

        [[rule]]
        match = "model.layers.1.self_attn.q_proj.weight"
        scheme = "skip"
    """,
    "opt": r"""
        default = "int8wo"

        [[rule]]
        match = 're:.*\.fc1'
        scheme = "skip"
    """,
    "flux": r"""
        default = "skip"

        [component.transformer]
        default = { scheme = "int8wo", group_size = 16 }

        [[component.transformer.rule]]
        match = 're:single_transformer_blocks\..*'
        scheme = "float8wo"

        [[component.transformer.rule]]
        match = "proj_out"
        scheme = "skip"
    """,
}


@pytest.fixture(scope="module", params=RECIPES)
def result(
    request: pytest.FixtureRequest, checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Name of the family, and the folder with what the recipe gave."""
    name = request.param
    folder = tmp_path_factory.mktemp("recipe")
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPES[name])
    aoconvert.quantize(checkpoints(name), recipe=recipe, output=folder / "first", min_quantized=0.1)
    return name, folder / "first"


def component(name: str, folder: Path) -> Path:
    return folder / tiny.FAMILIES[name].component


def stored(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.bin")
    values: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return values


def kinds(folder: Path) -> dict[str, str]:
    return {name: type(tensor).__name__ for name, tensor in stored(folder).items() if type(tensor) is not torch.Tensor}


def parts(tensor: torch.Tensor) -> list[tuple[torch.dtype, bytes]]:
    """Dtype and bytes of a tensor, or of each inner one."""
    if type(tensor.data) is torch.Tensor:
        return [(tensor.dtype, tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in parts(getattr(tensor, name))]


def test_each_rule_went_where_it_should(result: tuple[str, Path]) -> None:
    name, folder = result
    found = kinds(component(name, folder))
    if name == "mixtral":
        attention = "model.layers.{}.self_attn.{}_proj.weight"
        experts = "model.layers.{}.mlp.experts.{}_proj"
        assert found == {
            **{attention.format(0, part): "Int8Tensor" for part in "qk"},
            attention.format(0, "v"): "IntxUnpackedToInt8Tensor",
            attention.format(1, "k"): "Int8Tensor",
            **{experts.format(layer, part): "Float8Tensor" for layer in (0, 1) for part in ("gate_up", "down")},
        }
    elif name == "opt":
        assert set(found.values()) == {"Int8Tensor"}
        assert {key.split(".")[-2] for key in found} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc2"}
    else:
        assert "proj_out.weight" not in found
        for key, kind in found.items():
            assert kind == ("Float8Tensor" if key.startswith("single_") else "Int8Tensor")
        assert set(found.values()) == {"Float8Tensor", "Int8Tensor"}


def test_the_form_of_the_recorded_config(result: tuple[str, Path]) -> None:
    """Plain where the default went to linear layers alone."""
    name, folder = result
    values = json.loads((component(name, folder) / "config.json").read_text())["quantization_config"]
    expected = "Int8WeightOnlyConfig" if name == "opt" else "FqnToConfig"
    assert values["quant_type"]["default"]["_type"] == expected
    assert bool(values["modules_to_not_convert"]) == (name == "opt")


@pytest.mark.parametrize("record", ["config.json", "aoconvert.json", "dumped"])
def test_quantizing_again_from_what_is_recorded_gives_the_same_files(
    result: tuple[str, Path], record: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    name, folder = result
    recipe = component(name, folder) / "config.json" if record == "config.json" else folder / "aoconvert.json"
    if record == "dumped":
        path = tmp_path / "dumped.toml"
        path.write_text(dump(load(recipe)))
        recipe = path
    again = tmp_path / "again"
    aoconvert.quantize(checkpoints(name), recipe=recipe, output=again, min_quantized=0.1)
    first = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert first == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    for path in first:
        if path.name not in NOT_COMPARED:
            assert (folder / path).read_bytes() == (again / path).read_bytes(), path


def loads(name: str, folder: Path) -> None:
    """``from_pretrained`` gives every tensor as it was stored, the config too, and the model runs."""
    family = tiny.FAMILIES[name]
    opened = tiny.open_result(family, folder)
    model: Any = getattr(opened, family.component) if family.component else opened
    state = model.state_dict()
    for key, tensor in stored(component(name, folder)).items():
        assert type(state[key].data) is type(tensor.data), key
        assert parts(state[key]) == parts(tensor), key
    wanted = json.loads((component(name, folder) / "config.json").read_text())["quantization_config"]
    config = model.config.quantization_config
    assert (config if isinstance(config, dict) else config.to_dict()) == wanted
    quantizer = model.hf_quantizer
    assert type(quantizer).__name__ == "TorchAoHfQuantizer"
    assert quantizer.quantization_config.to_dict() == wanted
    assert tiny.FAMILIES[name].step(opened).isfinite().all()
    saved = folder.parent / "config-only"
    (model.save_config if family.library == "diffusers" else model.config.save_pretrained)(saved)
    assert json.loads((saved / "config.json").read_text())["quantization_config"] == wanted


def test_the_library_loads_it(result: tuple[str, Path]) -> None:
    loads(*result)


@pytest.mark.exhaustive
def test_a_fresh_process_loads_it(result: tuple[str, Path]) -> None:
    name, folder = result
    code = f"import test_recipe_roundtrip as t; from pathlib import Path; t.loads({name!r}, Path({str(folder)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layout_made_for_a_device_is_made_again(
    device: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """``config.json`` has no config for the CPU's layout of its own; the stand-in is taken for it."""
    source = checkpoints("opt")
    options = {"group_size": 32, "layout_device": device}
    aoconvert.quantize(source, "int4wo", output=tmp_path / "first", min_quantized=0.1, **options)  # type: ignore[arg-type]
    expected = {"cpu": {"Int4OpaqueTensor"}, "cuda": {"Int4TilePackedTo4dTensor"}}[device]
    assert set(kinds(tmp_path / "first").values()) == expected
    for record in ("config.json", "aoconvert.json"):
        again = tmp_path / f"again-{record}"
        aoconvert.quantize(source, recipe=tmp_path / "first" / record, output=again, min_quantized=0.1)
        for name in ("config.json", "pytorch_model.bin"):
            assert (tmp_path / "first" / name).read_bytes() == (again / name).read_bytes()
