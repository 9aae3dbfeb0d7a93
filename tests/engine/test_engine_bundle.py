"""A single file with a whole pipeline in it becomes what its folder becomes, and what diffusers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.bundles import BUNDLES, make_bundle
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.errors import SourceError

NAMES = [pytest.param(name, marks=[pytest.mark.exhaustive] if name == "sd1" else []) for name in BUNDLES]


def convert(source: Path, output: Path, **options: Any) -> Any:
    return aoconvert.quantize(source, "int8wo", output=output, min_quantized=0, device="cpu", **options)


def files(output: Path) -> dict[str, str]:
    manifest = json.loads((output / "aoconvert.json").read_text())
    entries = [entry for part in manifest["components"] + manifest["unquantized"] for entry in part["files"]]
    return {entry["path"]: entry["sha256"] for entry in [*entries, *manifest["copied"]]}


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_that_diffusers_makes_of_it(tmp_path: Path, name: str) -> None:
    file, pipeline = make_bundle(tmp_path, name)
    result = convert(file, tmp_path / "out", config=pipeline)
    [quantized] = [component.name for component in result.manifest.components]
    kind = getattr(diffusers, json.loads((pipeline / "model_index.json").read_text())["_class_name"])
    dtype = torch.bfloat16 if name == "sd3" else torch.float16
    theirs = kind.from_single_file(str(file), config=str(pipeline), torch_dtype=dtype)
    ours = kind.from_pretrained(tmp_path / "out", torch_dtype={quantized: torch.bfloat16, "default": dtype})
    assert ours.components.keys() == theirs.components.keys()
    for part, item in theirs.components.items():
        found = ours.components[part]
        assert type(found) is type(item), part
        if not isinstance(item, torch.nn.Module) or part == quantized:
            continue
        if hasattr(item, "tie_weights"):
            item.tie_weights()  # which from_single_file leaves to others
        state = found.state_dict()
        assert state.keys() == item.state_dict().keys()
        for key, tensor in item.state_dict().items():
            assert state[key].dtype == tensor.dtype
            assert torch.equal(state[key], tensor), (part, key)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bytes_as_the_folder(tmp_path: Path, name: str) -> None:
    file, pipeline = make_bundle(tmp_path, name)
    convert(file, tmp_path / "from-file", config=pipeline)
    convert(pipeline, tmp_path / "from-folder")
    here, there = files(tmp_path / "from-file"), files(tmp_path / "from-folder")
    if name == "sd1":
        index = json.loads((tmp_path / "from-file" / "model_index.json").read_text())
        assert index["safety_checker"] == [None, None]
        there = {path: sha for path, sha in there.items() if not path.startswith("safety_checker/")}
        here["model_index.json"] = there["model_index.json"]
    assert here == there


def tensors(output: Path) -> list[Any]:
    return [tensor for component in manifests.load(output).components for tensor in component.tensors]


def plan(file: Path, **options: Any) -> Any:
    return aoconvert.plan(file, "int8wo", min_quantized=0, device="cpu", **options)


def test_what_goes_nowhere_is_named(tmp_path: Path) -> None:
    file, pipeline = make_bundle(tmp_path, "sdxl")
    more = {"model_ema.decay": torch.ones(1), "denoiser.sigmas": torch.ones(2)}
    save_file(load_file(file) | more, file)
    made = plan(file, config=pipeline)
    [component] = made.components
    assert {item.name for item in component.dropped} == {*more, "conditioner.embedders.1.model.logit_scale"}
    assert [part.component.name for part in made.unquantized] == ["text_encoder", "text_encoder_2", "vae"]


def test_the_component_alone(tmp_path: Path) -> None:
    file, pipeline = make_bundle(tmp_path, "sdxl")
    made = plan(file, config=pipeline, component_only=True)
    assert (made.layout.kind, made.unquantized) == ("diffusers", ())
    assert any("first_stage_model" in item.name for item in made.components[0].dropped)


def test_a_file_without_all_of_the_pipeline(tmp_path: Path) -> None:
    file, pipeline = make_bundle(tmp_path, "sdxl", leave=("text_encoder_2",))
    made = plan(file, config=pipeline)
    assert made.layout.kind == "diffusers"
    assert "the file holds no text_encoder" in " ".join(made.warnings), made.warnings
    with pytest.raises(SourceError, match="--keep-original-files does not work with a single file"):
        plan(make_bundle(tmp_path / "whole", "sdxl")[0], config=pipeline, keep_original_files=True)


def test_a_text_encoder_is_quantized(tmp_path: Path) -> None:
    file, pipeline = make_bundle(tmp_path, "sdxl")
    options = {"components": {"unet": None, "text_encoder_2": None}}
    convert(file, tmp_path / "from-file", config=pipeline, **options)
    convert(pipeline, tmp_path / "from-folder", **options)
    here, there = ({t.name: t.sha256 for t in tensors(tmp_path / f"from-{kind}")} for kind in ("file", "folder"))
    assert here == there
