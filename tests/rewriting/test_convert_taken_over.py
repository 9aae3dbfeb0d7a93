"""Checkpoints that torchao, transformers or diffusers wrote, in the other format of weights files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bits import assert_same
from helpers.checkpoints import build_llama, pipeline
from safetensors.torch import save_file

import aoconvert
from aoconvert.errors import SourceError
from aoconvert.formats.registry import open_stored

__all__ = ["pipeline"]

SHAPE = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 64}


def by_transformers(folder: Path, config: Any, shards: int | str = "1GB", **shape: Any) -> tuple[Path, dict[str, Any]]:
    """What its ``save_pretrained`` writes of a model that it quantized, and the model's state."""
    import transformers

    source = build_llama(folder / "original", **{**SHAPE, **shape})
    model = transformers.LlamaForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=transformers.TorchAoConfig(config)
    )
    model.save_pretrained(folder / "theirs", max_shard_size=shards)
    return folder / "theirs", dict(model.state_dict())


def as_bin(folder: Path, theirs: Path, state: dict[str, Any]) -> Path:
    """The same with a ``.bin`` that ``torch.save`` wrote."""
    shutil.copytree(theirs, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def without_manifest(folder: Path, copy: Path) -> Path:
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("aoconvert.json")))


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a folder's weights files."""
    found = {}
    for path in sorted(folder.glob("*model*")):
        if path.suffix in (".bin", ".safetensors"):
            with open_stored(path) as stored:
                found |= {name: stored.read(name) for name in stored.contents.tensors}
    return found


def assert_state(made: dict[str, Any], state: dict[str, Any]) -> None:
    assert made.keys() == state.keys()
    for name, tensor in state.items():
        assert_same(made[name], tensor, name)


def opened(folder: Path) -> dict[str, Any]:
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, use_safetensors=bool(list(folder.glob("*.safetensors")))
    )
    return dict(model.state_dict())


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2)


def intx() -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))


def float8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


@pytest.mark.parametrize(
    ("config", "scheme", "shards"),
    [
        (int8, "int8wo", "1GB"),
        pytest.param(intx, "int4dq", "1GB", marks=pytest.mark.exhaustive),
        pytest.param(float8, "float8wo", "1GB", marks=pytest.mark.exhaustive),
    ],
)
def test_safetensors_of_transformers(tmp_path: Path, config: Any, scheme: str, shards: str) -> None:
    theirs, state = by_transformers(tmp_path, config(), shards)
    made = aoconvert.convert(theirs, "bin", output=tmp_path / "bin")
    assert_state(tensors(made.output), state)
    assert_state(opened(made.output), state)
    back = aoconvert.convert(made.output, "safetensors", output=tmp_path / "back")
    assert_state(tensors(back.output), state)
    assert_state(opened(back.output), opened(theirs))
    [entry] = made.manifest.components
    assert entry.scheme == scheme
    assert (
        entry.config == json.loads((theirs / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    )
    assert entry.converted is not None
    assert (entry.converted.kind, entry.converted.format) == ("torchao", "safetensors")
    assert entry.loads_with["torchao"].startswith(">=")
    assert (made.manifest.source.kind, made.manifest.source.repo_id) == ("folder", None)
    assert {file.path for file in made.manifest.source.files} == {path.name for path in theirs.glob("*.safetensors")}
    assert entry.totals.quantized_fraction > 0.9
    assert {tensor.kind for tensor in entry.tensors} == {"linear", "embedding", "other"}


def test_parts_of_one_tensor_in_two_shards(tmp_path: Path) -> None:
    theirs, state = by_transformers(tmp_path, int8(), 74084)
    index = theirs / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    assert [key for key in places if key.endswith("qdata") and places[key] != places[key[:-5] + "scale"]]
    assert_state(tensors(theirs), state)
    made = aoconvert.convert(theirs, "bin", output=tmp_path / "bin")
    assert_state(tensors(made.output), state)
    assert_state(opened(made.output), state)
    [found] = aoconvert.inspect(str(theirs)).components
    assert found.scheme == "int8wo"
    assert found.parameters == sum(tensor.numel() for tensor in state.values())
    comparison = aoconvert.diff(str(theirs), str(made.output))
    assert (comparison.equal, comparison.same) == (True, len(state))
    Path(theirs / sorted(set(places.values()))[1]).unlink()
    with pytest.raises(SourceError, match="does not exist"):
        aoconvert.convert(theirs, "bin", output=tmp_path / "none")


def test_a_bin_of_torch_save(tmp_path: Path) -> None:
    theirs, state = by_transformers(tmp_path, float8(), tie_word_embeddings=True)
    folder = as_bin(tmp_path / "theirs-bin", theirs, state)
    made = aoconvert.convert(folder, "safetensors", output=tmp_path / "there")
    assert_state(opened(made.output), opened(theirs))
    [entry] = made.manifest.components
    assert (entry.converted.format, entry.scheme) == ("bin", "float8wo")
    assert "Somebody else quantized it with torchao" in aoconvert.card(made.output).text
    back = aoconvert.convert(without_manifest(made.output, tmp_path / "copy"), "bin", output=tmp_path / "back")
    assert_state(tensors(back.output), state)
    assert aoconvert.verify(back.output, reload=False).ok


def test_what_aoconvert_wrote_goes_there_and_back_without_its_manifest(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", **SHAPE)
    aoconvert.quantize(source, "int4dq", output=tmp_path / "bin", device="cpu", max_shard_size="150KB")
    bare = without_manifest(tmp_path / "bin", tmp_path / "bare")
    there = aoconvert.convert(bare, "safetensors", output=tmp_path / "there")
    again = without_manifest(there.output, tmp_path / "bare-there")
    back = aoconvert.convert(again, "bin", output=tmp_path / "back")
    for path in bare.iterdir():
        assert (back.output / path.name).read_bytes() == path.read_bytes(), path.name


def test_torchaos_own_writer(tmp_path: Path) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    theirs, state = by_transformers(tmp_path, float8())
    folder = as_bin(tmp_path / "own", theirs, state)
    (folder / "pytorch_model.bin").unlink()
    arrays, metadata = flatten_tensor_state_dict(state)
    save_file(arrays, folder / "model.safetensors", metadata)
    made = aoconvert.convert(folder, "bin", output=tmp_path / "bin")
    assert_state(tensors(made.output), state)


@pytest.mark.parametrize("format_", ["safetensors", "bin"])
def test_a_pipeline_that_diffusers_quantized(tmp_path: Path, pipeline: Path, format_: str) -> None:
    import diffusers

    source = Path(shutil.copytree(pipeline, tmp_path / "source"))
    model = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        source / "transformer", torch_dtype=torch.bfloat16, quantization_config=diffusers.TorchAoConfig(int8())
    )
    shutil.rmtree(source / "transformer")
    model.save_pretrained(source / "transformer", safe_serialization=format_ == "safetensors")
    other = "bin" if format_ == "safetensors" else "safetensors"
    made = aoconvert.convert(source, other, output=tmp_path / "made")
    assert {part.path for part in made.manifest.unquantized} == {"text_encoder", "vae"}
    assert not list(made.output.rglob(f"*.{format_}"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(made.output, torch_dtype=torch.bfloat16)
    assert_state(dict(pipe.transformer.state_dict()), dict(model.state_dict()))
    back = aoconvert.convert(made.output, format_, output=tmp_path / "back")
    before, after = (tensors(folder / "transformer") for folder in (source, back.output))
    assert_state(after, before)


def test_what_cannot_be_taken_over_is_said(tmp_path: Path) -> None:
    plain = build_llama(tmp_path / "plain", **SHAPE)
    with pytest.raises(SourceError, match="holds no tensor that torchao quantized"):
        aoconvert.convert(plain, "bin")
    theirs, _ = by_transformers(tmp_path, int8())
    config = json.loads((theirs / "config.json").read_text())
    del config["quantization_config"]
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="does not say how torchao quantized"):
        aoconvert.convert(theirs, "bin")
    old = Path(__file__).parents[1] / "fixtures/legacy/diffusers-0.33.1-torchao-0.10.0/int8wo"
    with pytest.raises(SourceError, match="older torchao") as caught:
        aoconvert.convert(old, "safetensors", output=tmp_path / "out")
    assert "aoconvert migrate" in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "plain", "theirs"]
