"""The sizes a plan names are the sizes that come out, to the byte."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import build_llama, shard

import aoconvert
from aoconvert.checkpoint import manifest
from aoconvert.humanize import size
from aoconvert.planning.types import Plan


def convert(source: Path, output: Path, scheme: str = "int8wo", **options: object) -> tuple[Plan, manifest.Manifest]:
    made = aoconvert.plan(source, scheme, output=output, device="cpu", **options)
    assert not output.exists()
    aoconvert.quantize(source, scheme, output=output, device="cpu", **options)
    return made, manifest.load(output)


def check(made: Plan, written: manifest.Manifest, output: Path) -> None:
    for plan, entry in zip(made.components, written.components, strict=True):
        assert [t.name for t in plan.tensors] == [t.name for t in entry.tensors]
        for tensor, real in zip(plan.tensors, entry.tensors, strict=True):
            assert (tensor.bytes_in, tensor.bytes_out) == (real.bytes_in, real.bytes_out), tensor.name
            assert (tensor.action, tensor.reason, tensor.file) == (real.action, real.reason, real.file)
        names: list[str] = []
        for file in plan.files:
            assert (output / file.path).stat().st_size == file.size
            names += torch.load(output / file.path, weights_only=True, map_location="meta")
        assert sorted(names) == sorted(t.name for t in plan.tensors if t.action != "tied")
    for part, stored in zip(made.unquantized, written.unquantized, strict=True):
        assert [(t.name, t.dtype, tuple(t.shape)) for t in part.tensors] == [
            (t.name, t.dtype, t.shape) for t in stored.tensors
        ]
        for file in part.files:
            assert (output / file.path).stat().st_size == file.size
    for item in made.copied:
        assert (output / item.path).stat().st_size == item.size
    on_disk = {os.path.relpath(Path(at, name), output) for at, _, files in os.walk(output) for name in files}
    recorded = [file.path for model in (*written.components, *written.unquantized) for file in model.files]
    assert on_disk == {*recorded, *(item.path for item in written.copied), manifest.MANIFEST_NAME}


@pytest.mark.parametrize("scheme", ["int8wo", "float8wo", "int4dq"])
def test_llama(llama: Path, tmp_path: Path, scheme: str) -> None:
    check(*convert(llama, tmp_path / "out", scheme), tmp_path / "out")


def test_tied_llama(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "tied", tie_word_embeddings=True)
    made, written = convert(source, tmp_path / "out")
    check(made, written, tmp_path / "out")
    head = next(t for t in made.components[0].tensors if t.name == "lm_head.weight")
    assert (head.action, head.file, head.bytes_out, head.bytes_in) == ("tied", None, 0, 0)
    assert head.reason == "the same tensor as model.embed_tokens.weight"
    # a checkpoint may name the shared tensor by its other name only
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors")
    made = aoconvert.plan(source, "int8wo", output=tmp_path / "other", device="cpu")
    table = next(t for t in made.components[0].tensors if t.name == "model.embed_tokens.weight")
    assert table.origin == ("model.safetensors", "lm_head.weight")


def test_pipeline(pipeline: Path, tmp_path: Path) -> None:
    check(*convert(pipeline, tmp_path / "out"), tmp_path / "out")


def test_two_components_with_two_schemes(pipeline: Path, tmp_path: Path) -> None:
    components = {"transformer": None, "text_encoder": "float8wo"}
    made, written = convert(pipeline, tmp_path / "out", components=components)
    check(made, written, tmp_path / "out")
    assert [(c.name, c.scheme) for c in written.components] == [("transformer", "int8wo"), ("text_encoder", "float8wo")]
    assert not any(item.path.startswith(("transformer/", "text_encoder/")) for item in written.copied)


def test_subfolder(pipeline: Path, tmp_path: Path) -> None:
    """A part of a pipeline as a model of its own."""
    made, written = convert(pipeline, tmp_path / "out", subfolder="/transformer/")
    check(made, written, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "aoconvert.json",
        "config.json",
        "diffusion_pytorch_model.bin",
    ]
    for subfolder in ("unet", "..", "../tiny-cogvideox", "transformer/config.json"):
        with pytest.raises(aoconvert.SourceError, match="has no folder"):
            aoconvert.plan(pipeline, "int8wo", subfolder=subfolder, output=tmp_path / "other", device="cpu")


def test_component_only(pipeline: Path, tmp_path: Path) -> None:
    made, written = convert(pipeline, tmp_path / "out", component_only=True)
    check(made, written, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "aoconvert.json",
        "config.json",
        "diffusion_pytorch_model.bin",
    ]


@pytest.mark.parametrize("limit", ["20KB", "64KB"])
def test_shards(llama: Path, tmp_path: Path, limit: str) -> None:
    made, written = convert(llama, tmp_path / "out", max_shard_size=limit)
    check(made, written, tmp_path / "out")
    plan, most = made.components[0], int(limit.removesuffix("KB")) * 1000
    assert len(plan.files) > 1
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"] == {t.name: t.file for t in plan.tensors if t.file}
    assert index["metadata"]["total_size"] == plan.totals.bytes_out
    for file in plan.files:
        inside = [t for t in plan.tensors if t.file == file.path]
        assert sum(t.bytes_out for t in inside) <= most or len(inside) == 1
        held = torch.load(tmp_path / "out" / file.path, weights_only=True)
        assert sorted(held) == sorted(t.name for t in inside)


def test_sharded_source(llama: Path, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "sharded")
    shard(source, "model", 3)
    made, written = convert(source, tmp_path / "out")
    check(made, written, tmp_path / "out")
    assert [file.path for file in written.source.files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert not any("index" in item.path for item in written.copied)
    # the same tensors as from one file
    other = aoconvert.plan(llama, "int8wo", output=tmp_path / "other", device="cpu")
    key = [(t.name, t.action, t.bytes_out) for t in other.components[0].tensors]
    assert [(t.name, t.action, t.bytes_out) for t in made.components[0].tensors] == key


def test_config_alone_plans_the_same_tensors(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((llama / "config.json").read_bytes())
    full = aoconvert.plan(llama, "int8wo", output=tmp_path / "out", device="cpu").components[0]
    bare = aoconvert.plan(tmp_path / "bare", "int8wo", output=tmp_path / "out", device="cpu").components[0]
    assert bare.totals == full.totals
    assert sum(f.size for f in bare.files) == pytest.approx(sum(f.size for f in full.files), rel=0.01)
    with pytest.raises(aoconvert.PlanError, match="no weights in bare"):
        aoconvert.quantize(tmp_path / "bare", "int8wo", output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_fewer_bits_that_take_more_bytes_are_said(llama: Path, tmp_path: Path) -> None:
    """tile_packed_to_4d pads to 1024 columns: a small int4 layer is larger than its int8 one."""
    options: dict[str, Any] = {"device": "cpu", "output": tmp_path / "out", "group_size": 32}
    plan = aoconvert.plan(llama, "int4wo", layout_device="cuda", **options)
    (line,) = [line for line in plan.warnings if "int8wo would take" in line]
    int8 = aoconvert.plan(llama, "int8wo", device="cpu", output=tmp_path / "out")
    sizes = [
        size(sum(t.bytes_out for t in made.components[0].tensors if t.action == "quantize")) for made in (plan, int8)
    ]
    assert f"int4wo takes {sizes[0]}, int8wo would take {sizes[1]}" in line
    plan = aoconvert.plan(llama, "int4wo", layout_device="cpu", **options)
    assert not any("int8wo would take" in line for line in plan.warnings)
