"""Kinds of sources and of results: .bin sources, several components, shards of a diffusers model, base dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file

import aoconvert


def as_bin(folder: Path, stem: str, target: str, shards: int = 1) -> None:
    """Turn the folder's safetensors into torch .bin files, as older checkpoints have them."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / f"{target}.bin")
        return
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = f"{target}-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{target}.bin.index.json").write_text(json.dumps(index))


def contents(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "aoconvert.json").read_text())
    return {tensor["name"]: tensor["sha256"] for item in manifest["components"] for tensor in item["tensors"]}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "t5"])
def test_transformers_bin_sources(family: str, shards: int, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """The same tensors, whatever file they come from; experts merged from a .bin too."""
    import shutil

    expected = tmp_path / "expected"
    aoconvert.quantize(checkpoints(family), "int8wo", output=expected, device="cpu", min_quantized=0)
    source = tmp_path / "source"
    shutil.copytree(checkpoints(family), source)
    as_bin(source, "model", "pytorch_model", shards)
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    assert contents(tmp_path / "out") == contents(expected)
    assert {file.path for file in result.manifest.source.files} == {path.name for path in source.glob("*.bin")}
    assert not list((tmp_path / "out").glob("merged-*"))
    opened = tiny.open_result(tiny.FAMILIES[family], tmp_path / "out")
    assert tiny.tokens_step(opened).isfinite().all()


def test_diffusers_bin_source(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "source"
    shutil.copytree(checkpoints("flux") / "transformer", source)
    aoconvert.quantize(source, "int8wo", output=tmp_path / "expected", device="cpu", min_quantized=0)
    as_bin(source, "diffusion_pytorch_model", "diffusion_pytorch_model")
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    model = tiny.diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert type(model.transformer_blocks[0].attn.to_q.weight.data).__name__ == "Int8Tensor"


def test_a_sharded_diffusers_model(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers#14811: only with use_safetensors=False; the manifest says so."""
    result = aoconvert.quantize(
        checkpoints("cogvideox") / "transformer",
        "int8wo",
        output=tmp_path / "out",
        device="cpu",
        max_shard_size="1MB",
    )
    assert len(list((tmp_path / "out").glob("*.bin"))) > 2
    assert any("use_safetensors=False" in line for line in result.warnings)
    load = result.manifest.components[0].load
    assert load.kwargs == {"torch_dtype": "bfloat16", "use_safetensors": False}
    model = tiny.diffusers.CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "out", torch_dtype=torch.bfloat16, use_safetensors=False
    )
    weights = [module.weight.data for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(type(weight).__name__ == "Int8Tensor" for weight in weights)


def test_several_components_each_with_its_scheme(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    result = aoconvert.quantize(
        checkpoints("flux"),
        "int8wo",
        output=tmp_path / "out",
        device="cpu",
        components={"transformer": None, "text_encoder_2": "float8wo", "text_encoder": "int4dq"},
    )
    assert [(item.name, item.scheme) for item in result.manifest.components] == [
        ("transformer", "int8wo"),
        ("text_encoder_2", "float8wo"),
        ("text_encoder", "int4dq"),
    ]
    pipe = tiny.open_result(tiny.FAMILIES["flux"], tmp_path / "out")

    def kinds(model: Any) -> set[str]:
        return {type(m.weight.data).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)}

    assert kinds(pipe.transformer) == {"Int8Tensor"}
    assert kinds(pipe.text_encoder_2) == {"Float8Tensor", "Tensor"}  # T5 keeps its wo
    assert kinds(pipe.text_encoder) == {"IntxUnpackedToInt8Tensor"}
    assert tiny.flux_step(pipe).isfinite().all()


def test_one_component_alone(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    whole, alone, inside = tmp_path / "whole", tmp_path / "alone", tmp_path / "inside"
    aoconvert.quantize(checkpoints("sd3"), "int8wo", output=whole, device="cpu")
    aoconvert.quantize(checkpoints("sd3"), "int8wo", output=alone, device="cpu", component_only=True)
    aoconvert.quantize(checkpoints("sd3"), "int8wo", output=inside, device="cpu", subfolder="transformer")
    assert contents(whole) == contents(alone) == contents(inside)
    for folder in (alone, inside):
        assert not (folder / "model_index.json").exists()
        model = tiny.diffusers.SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert type(model.proj_out.weight.data).__name__ == "Int8Tensor"


def test_both_denoisers_of_wan_2_2(tmp_path: Path) -> None:
    """Wan 2.2 has two transformers, for early and late steps; one alone would leave half of the model as it was."""
    source = tmp_path / "source"
    tiny.wan_pipeline(source)
    pipe = tiny.diffusers.WanPipeline.from_pretrained(source)
    pipe.register_modules(transformer_2=tiny.wan_transformer())
    pipe.register_to_config(boundary_ratio=0.5)
    pipe.save_pretrained(source)
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert [item.name for item in result.manifest.components] == ["transformer", "transformer_2"]
    opened = tiny.diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    for part in (opened.transformer, opened.transformer_2):
        assert type(part.blocks[0].attn1.to_q.weight.data).__name__ == "Int8Tensor"


@pytest.mark.parametrize("dtype", ["float16", "float32", "auto"])
@pytest.mark.parametrize("family", ["wan", "opt", "t5", "bert"])
def test_base_dtypes(family: str, dtype: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """What is not quantized is the source cast to the dtype; the library keeps it when it opens the result."""
    from aoconvert import schemes
    from aoconvert.schemes.apply import quantize_weight

    kind = tiny.FAMILIES[family]
    source = checkpoints(family) / kind.component
    original = load_file(next(source.glob("*.safetensors")))
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", dtype=dtype)
    [component] = result.manifest.components
    written = torch.load(next((tmp_path / "out").glob("*.bin")), weights_only=True)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    kept = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"} if family == "wan" else set()
    if family == "t5" and dtype == "float16":
        kept = {"wo"}
    seen = set()
    for tensor in component.tensors:
        if tensor.action == "tied":
            continue
        name = tensor.name if tensor.name in original else f"decoder.{tensor.name}"
        name = name if name in original else tensor.name.removeprefix("model.")
        before = original[name]
        in_fp32 = bool(kept & set(tensor.name.split(".")))
        base = torch.float32 if in_fp32 else (wanted or before.dtype) if before.is_floating_point() else before.dtype
        expected = before.to(base)
        if tensor.action == "quantize":
            expected = quantize_weight(expected, schemes.get("int8wo"))
            assert torch.equal(written[tensor.name].qdata, expected.qdata), tensor.name
            assert torch.equal(written[tensor.name].scale, expected.scale), tensor.name
            assert not in_fp32
        else:
            assert torch.equal(written[tensor.name], expected), tensor.name
        assert written[tensor.name].dtype == expected.dtype == getattr(torch, tensor.dtype)
        seen.add(tensor.action)
    assert "quantize" in seen
    if kind.library == "transformers":
        opened = getattr(tiny.transformers, kind.opener).from_pretrained(tmp_path / "out")
        with torch.no_grad():
            assert tiny.tokens_step(opened).isfinite().all()


def test_the_licence_is_taken_from_the_card(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    result = aoconvert.quantize(checkpoints("bert"), "int8wo", output=tmp_path / "out", device="cpu")
    assert result.manifest.source.license == "apache-2.0"
    assert result.manifest.source.kind == "folder"
    assert result.manifest.source.repo_id is None


def test_auto_dtype_is_named_for_the_loader(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers would open what is not quantized in float32, beside a bfloat16 model."""
    result = aoconvert.quantize(checkpoints("flux"), "int8wo", output=tmp_path / "out", device="cpu", dtype="auto")
    [component] = result.manifest.components
    assert component.dtype == "bfloat16"
    assert component.load.kwargs == {"torch_dtype": "bfloat16"}
    assert tiny.flux_step(tiny.open_result(tiny.FAMILIES["flux"], tmp_path / "out")).isfinite().all()
