"""Two checkpoints, tensor by tensor: what is the same, what differs first, and by how many dB torchao says so."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import converted
from helpers.checkpoints import build_llama, llama, llama_tensors, pipeline, shard
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.comparison import Comparison
from aoconvert.environment import import_torchao
from aoconvert.errors import SourceError

__all__ = ["llama", "pipeline"]

State = dict[str, Any]


def configs() -> Mapping[str, Callable[[], Any]]:
    import_torchao()
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        PerTensor,
    )

    return {
        "int8wo": Int8WeightOnlyConfig,
        "int8dq": Int8DynamicActivationInt8WeightConfig,
        "int8 in groups": lambda: Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "float8wo": Float8WeightOnlyConfig,
        "float8dq per tensor": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()),
        "int4 in groups": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "mxfp8": MXDynamicActivationMXWeightConfig,
        "nvfp4": NVFP4WeightOnlyConfig,
    }


def quantized(name: str, *, seed: int = 0) -> State:
    """A linear layer of 128 to 64, with its bias, and the plain weight under another name."""
    from aoconvert.schemes.apply import quantize_with

    config = configs()[name]()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 128, generator=generator).bfloat16()
    return {"proj.weight": quantize_with(weight, config), "proj.bias": torch.ones(64), "plain.weight": weight}


def saved(state: State, path: Path) -> str:
    """As torch saves it, or as torchao does in safetensors."""
    if path.suffix == ".bin":
        torch.save(state, path)
        return str(path)
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict(state)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return str(path)


def sqnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """By its definition, in float64."""
    a, b = a.double(), b.double()
    return 20 * math.log10(float(a.norm() / (a - b).norm()))


def one(found: Comparison) -> Any:
    [item] = found.different
    return item


@pytest.mark.parametrize("name", list(configs()))
def test_formats_hold_the_same(name: str, tmp_path: Path) -> None:
    state = quantized(name)
    a, b = saved(state, tmp_path / "a.bin"), saved(state, tmp_path / "b.safetensors")
    assert aoconvert.diff(a, b) == Comparison(3, (), (), ())
    assert aoconvert.diff(b, a).equal


@pytest.mark.parametrize("suffix", ["bin", pytest.param("safetensors", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", list(configs()))
def test_the_distance_is_that_of_torchao(name: str, suffix: str, tmp_path: Path) -> None:
    a, b = quantized(name), quantized(name, seed=1)
    found = aoconvert.diff(saved(a, tmp_path / f"a.{suffix}"), saved(b, tmp_path / f"b.{suffix}"))
    assert found.different == tuple(sorted(found.different, key=lambda item: item.sqnr_db))
    measured = {item.name: item for item in found.different}
    assert {item.name: item.what for item in found.different} == {"plain.weight": "values", "proj.weight": "codes"}
    values = [state["proj.weight"].dequantize() for state in (a, b)]
    assert measured["proj.weight"].sqnr_db == pytest.approx(sqnr(*values), abs=1e-3)
    assert measured["plain.weight"].sqnr_db == pytest.approx(sqnr(a["plain.weight"], b["plain.weight"]), abs=1e-3)
    # against its source: the plain one is the reference, whichever side it is on
    plain = {"proj.weight": a["plain.weight"]}
    save_file(plain, tmp_path / "source.safetensors")
    wanted = pytest.approx(sqnr(a["plain.weight"], values[0]), abs=1e-3)
    for sides in (("a." + suffix, "source.safetensors"), ("source.safetensors", "a." + suffix)):
        item = one(aoconvert.diff(*(tmp_path / side for side in sides)))
        assert (item.what, item.sqnr_db) == ("class", wanted)


def test_one_code(tmp_path: Path) -> None:
    a, b = quantized("int8wo"), quantized("int8wo")
    b["proj.weight"].qdata[3, 5] += 1
    item = one(aoconvert.diff(saved(a, tmp_path / "a.bin"), saved(b, tmp_path / "b.safetensors")))
    assert (item.what, item.detail) == ("codes", "1 of 8,192 qdata")
    assert item.sqnr_db == pytest.approx(sqnr(a["proj.weight"].dequantize(), b["proj.weight"].dequantize()), abs=1e-3)


def test_scales(tmp_path: Path) -> None:
    a, b = quantized("int8wo"), quantized("int8wo")
    b["proj.weight"].scale[3:5] *= 2
    item = one(aoconvert.diff(saved(a, tmp_path / "a.bin"), saved(b, tmp_path / "b.bin")))
    assert (item.what, item.detail) == ("scales", "2 of 64 scale")
    assert item.sqnr_db == pytest.approx(sqnr(a["proj.weight"].dequantize(), b["proj.weight"].dequantize()), abs=1e-3)


def test_group_size(tmp_path: Path) -> None:
    a, b = quantized("int8wo"), quantized("int8 in groups")
    item = one(aoconvert.diff(saved(a, tmp_path / "a.bin"), saved(b, tmp_path / "b.bin")))
    assert item.what == "codes"
    assert "scale of shape [64, 1] and [64, 4]" in item.detail


def test_settings_of_the_same_numbers(tmp_path: Path) -> None:
    """Quantized weights that a model multiplies in another way."""
    a, b = quantized("int8wo"), quantized("int8dq")
    item = one(aoconvert.diff(saved(a, tmp_path / "a.bin"), saved(b, tmp_path / "b.safetensors")))
    assert (item.what, item.sqnr_db) == ("class", None)
    assert item.detail == "other act_quant_kwargs; the values are the same numbers"


def test_plain_tensors(tmp_path: Path) -> None:
    a = {
        "dtype": torch.tensor([1.0, 2.0]),
        "rounded": torch.tensor([1.001]),
        "shape": torch.ones(2, 3),
        "scalar": torch.tensor(3.0),
        "count": torch.tensor([1, 2, 3]),
        "complex": torch.tensor([1 + 2j]),
        "nan": torch.tensor([math.nan, 1.0]),
        "nothing": torch.empty(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "a": torch.ones(1),
    }
    b = {
        **{name: tensor.clone() for name, tensor in a.items() if name != "a"},
        "dtype": a["dtype"].bfloat16(),
        "rounded": a["rounded"].bfloat16(),
        "shape": torch.ones(3, 2),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor([1, 2, 4]),
        "complex": torch.tensor([1 + 3j]),
        "nan": torch.tensor([math.nan, 2.0]),
        "b": torch.ones(1),
    }
    found = aoconvert.diff(saved(a, tmp_path / "a.bin"), saved(b, tmp_path / "b.bin"))
    assert (found.same, found.only_a, found.only_b) == (2, ("a",), ("b",))
    rows = {item.name: (item.what, item.sqnr_db) for item in found.different}
    # what cannot be compared comes first, then by distance, then what has equal numbers
    assert list(rows) == ["complex", "nan", "shape", "count", "scalar", "rounded", "dtype"]
    assert rows["shape"] == ("shape", None)
    assert rows["dtype"] == ("dtype", None)
    assert rows["scalar"] == ("values", pytest.approx(20 * math.log10(6), abs=1e-3))
    assert rows["rounded"][0] == "dtype"
    assert rows["complex"] == ("values", None)
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_tied_names(tmp_path: Path) -> None:
    """A name for bytes that both have under another name is not missing; a copy of its own is."""
    shared = torch.ones(4, 4)
    a = {"embed": shared, "head": shared, "copy": shared.clone()}
    torch.save(a, tmp_path / "a.bin")
    save_file({"embed": shared}, tmp_path / "b.safetensors")
    found = aoconvert.diff(tmp_path / "a.bin", tmp_path / "b.safetensors")
    assert (found.same, found.tied, found.only_a, found.only_b) == (1, ("head",), ("copy",), ())
    del a["copy"]
    torch.save(a, tmp_path / "a.bin")
    assert aoconvert.diff(tmp_path / "b.safetensors", tmp_path / "a.bin").equal


def test_shards_against_one_file(llama: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(llama, tmp_path / "shards"))
    shard(shards, "model", 3)
    found = aoconvert.diff(llama, shards)
    assert (found.equal, found.same) == (True, len(load_file(llama / "model.safetensors")))


def test_a_checkpoint_and_its_source(llama: Path, tmp_path: Path) -> None:
    """Every quantized weight has the distance that the manifest states."""
    made = aoconvert.quantize(llama, "int8wo", output=tmp_path / "out", device="cpu")
    found = aoconvert.diff(tmp_path / "out", llama)
    entries = {entry.name: entry for entry in made.manifest.components[0].tensors}
    stated = {name: entry.sqnr_db for name, entry in entries.items() if entry.action == "quantize"}
    assert {item.name: item.sqnr_db for item in found.different} == pytest.approx(stated, abs=2e-4)
    assert {item.what for item in found.different} == {"class"}
    assert found.same == len(entries) - len(stated)
    assert not found.only_a + found.only_b


@pytest.mark.parametrize("name", ["mixtral", pytest.param("qwen3-moe", marks=pytest.mark.exhaustive)])
def test_a_source_that_the_library_merges(name: str, tmp_path: Path) -> None:
    """Experts that lie apart in the source are one tensor in the checkpoint: it is compared as the library loads it."""
    converted.build(name, tmp_path / "source")
    scheme, output = "int8wo", tmp_path / "out"
    made = aoconvert.quantize(tmp_path / "source", scheme, output=output, device="cpu", min_quantized=0.0)
    entries = {entry.name: entry for entry in made.manifest.components[0].tensors if entry.action != "tied"}
    stated = {key: entry.sqnr_db for key, entry in entries.items() if entry.action == "quantize"}
    assert set(load_file(next((tmp_path / "source").glob("*.safetensors")))) != set(entries)
    for sides in ((output, tmp_path / "source"), (tmp_path / "source", output)):
        found = aoconvert.diff(*sides)
        assert (found.only_a, found.only_b) == ((), ())
        assert {item.name: item.sqnr_db for item in found.different} == pytest.approx(stated, abs=2e-4)
        assert found.same == len(entries) - len(stated)


def test_another_model_is_no_source(llama: Path, tmp_path: Path) -> None:
    """It is compared all the same, tensor by tensor."""
    aoconvert.quantize(llama, "int8wo", output=tmp_path / "out", device="cpu")
    converted.build("olmoe", tmp_path / "other")
    found = aoconvert.diff(tmp_path / "out", tmp_path / "other")
    assert "model.layers.0.mlp.gate_proj.weight" in found.only_a
    assert "model.layers.0.mlp.experts.gate_up_proj" in found.only_b


def test_pipelines_and_their_parts(pipeline: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(pipeline, tmp_path / "other"))
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights)
    found = aoconvert.diff(pipeline, other)
    assert [item.name for item in found.different] == [f"vae/{name}"]
    assert not found.left_out
    alone = aoconvert.diff(other / "vae", pipeline)
    assert [item.name for item in alone.different] == [name]
    assert set(alone.left_out) == {"transformer", "text_encoder"}
    with pytest.raises(SourceError, match=r"is one model, but .* is a pipeline that has no LlamaForCausalLM"):
        aoconvert.diff(pipeline, build_llama(tmp_path / "llama", tensors=llama_tensors()))


def test_int4_of_two_layouts(tmp_path: Path) -> None:
    """Codes packed in another way stand for the same numbers."""
    source = build_llama(tmp_path / "llama", hidden_size=128, intermediate_size=256)
    options: Any = {"group_size": 64, "min_quantized": 0.0, "device": "cpu"}
    for device in ("cpu", "cuda"):
        aoconvert.quantize(source, "int4wo", layout_device=device, output=tmp_path / device, **options)
    found = aoconvert.diff(tmp_path / "cpu", tmp_path / "cuda")
    assert {(item.what, item.sqnr_db) for item in found.different} == {("class", None)}
    assert all(item.detail.endswith("the values are the same numbers") for item in found.different)
    far = aoconvert.diff(tmp_path / "cpu", source)
    assert all(item.sqnr_db is not None and item.sqnr_db > 15 for item in far.different)
