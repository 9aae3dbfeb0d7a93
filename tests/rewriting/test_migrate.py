"""Old checkpoints in the classes of today: what the release that wrote them computed, bit for bit, or an answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import LLAMA, build_llama, llama_shapes, llama_tensors, write_config
from helpers.old_torchao import save_codes, save_fp6, save_old, save_old_float8
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert import schemes
from aoconvert.checkpoint import manifest as manifests
from aoconvert.errors import PlanError, SourceError, UnsafePickleError, UsageError
from aoconvert.rewriting.migrate_types import CannotMigrate, SchemeName, read_meta
from aoconvert.rewriting.old_file import OldFile
from aoconvert.rewriting.old_torchao.decide import decide
from aoconvert.schemes import floatx_packing
from aoconvert.schemes.tensors import take_apart

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy"
DIFFUSERS = LEGACY / "diffusers-0.33.1-torchao-0.10.0"

# folder → class of today, scheme, group size, settings
CARRIED: dict[str, tuple[str, SchemeName]] = {
    "diffusers-0.33.1-torchao-0.10.0/float8wo_e4m3": ("Float8Tensor", SchemeName("float8wo")),
    "diffusers-0.33.1-torchao-0.10.0/int8dq": ("Int8Tensor", SchemeName("int8dq")),
    "diffusers-0.33.1-torchao-0.10.0/int8wo": ("Int8Tensor", SchemeName("int8wo")),
    "torchao-0.4.0/int8wo": ("Int8Tensor", SchemeName("int8wo")),
    "torchao-0.6.1/int8dq": ("Int8Tensor", SchemeName("int8dq")),
    "torchao-0.6.1/float8dq_e4m3_perrow": ("Float8Tensor", SchemeName("float8dq_row")),
    "torchao-0.7.0/int8wo_g32": ("Int8Tensor", SchemeName("int8wo", 32)),
    "torchao-0.10.0/int8wo": ("Int8Tensor", SchemeName("int8wo")),
    "torchao-0.10.0/int8dq": ("Int8Tensor", SchemeName("int8dq")),
    "torchao-0.10.0/int8dq_asym": ("Int8Tensor", SchemeName("int8dq", None, {"act_mapping_type": "asymmetric"})),
    "torchao-0.10.0/float8wo_e4m3": ("Float8Tensor", SchemeName("float8wo")),
    "torchao-0.10.0/float8dq_e4m3_pertensor": ("Float8Tensor", SchemeName("float8dq")),
    "torchao-0.10.0-float16/int8wo": ("Int8Tensor", SchemeName("int8wo")),
    "torchao-0.17.0/int8wo": ("Int8Tensor", SchemeName("int8wo")),
    "torchao-0.10.0/int4dq_g32_asym": (
        "IntxUnpackedToInt8Tensor",
        SchemeName("int4dq", 32, {"weight_mapping_type": "asymmetric"}),
    ),
    "torchao-0.10.0/uint3wo_g64": ("IntxUnpackedToInt8Tensor", SchemeName("uint3wo", 64)),
    "torchao-0.5.0/uint4wo_g64": ("IntxUnpackedToInt8Tensor", SchemeName("uint4wo", 64)),
    "torchao-0.15.0/uint4wo_g64": ("IntxUnpackedToInt8Tensor", SchemeName("uint4wo", 64)),
    "torchao-0.10.0/int4a4w": ("IntxUnpackedToInt8Tensor", SchemeName("intx4wo")),
}
CARRIED |= {
    "torchao-0.13.0/int4x_pergroup32_v2": ("IntxUnpackedToInt8Tensor", SchemeName("intx4wo", 32)),
    "torchao-0.15.0/int8wo_v2": ("Int8Tensor", SchemeName("int8wo")),
    "torchao-0.15.0/float8dq_e4m3_perrow_v2": ("Float8Tensor", SchemeName("float8dq_row")),
    "torchao-0.17.0/int8dq_v2": ("Int8Tensor", SchemeName("int8dq")),
}
DEQUANTIZED = {
    "torchao-0.10.0/uint4wo_g64_hqq": "its zero points are values",
    "torchao-0.10.0/nf4_b64": "torchao has no config for NF4",
    "torchao-0.5.0/fp6_e3m2": "torchao has no class for floats of 6 bits any more",
}
# packed int4: class of today, layout device, packing; the truth is in the weight's dtype, with two roundings
PACKED = {
    "torchao-0.10.0/int4wo_cpu_g32": ("Int4OpaqueTensor", "cpu", "opaque_avx512"),
    "torchao-0.14.1/int4wo_v2_opaque_g32": ("Int4OpaqueTensor", "cpu", "opaque_avx512"),
    "torchao-0.13.0/int4wo_tiled_g32": ("Int4TilePackedTo4dTensor", "cuda", None),
}


def quantized(folder: str) -> Any:
    """The open file, its quantized tensors, and what their release computed of them."""
    file = OldFile(next((LEGACY / folder).glob("*.bin")))
    truth = load_file(LEGACY / folder / "dequant.safetensors")
    return file, {name: tensor for name, tensor in file.tensors.items() if tensor.data is None}, truth


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("folder", CARRIED)
def test_codes_and_scales_are_carried_over(folder: str) -> None:
    kind, name = CARRIED[folder]
    file, tensors, truth = quantized(folder)
    compared = 0
    with file:
        for key, tensor in tensors.items():
            outcome = decide(tensor, file.read)
            made: Any = outcome.make(file.read)
            group = name.group_size if tensor.shape[1] != name.group_size else None
            assert (type(made).__name__, outcome.scheme) == (kind, SchemeName(name.name, group, name.settings))
            assert (made.shape, made.dtype) == (tensor.shape, getattr(torch, tensor.dtype))
            empty: Any = outcome.make(read_meta)
            assert [getattr(empty, part).shape for part in empty.__tensor_flatten__()[0]] == [
                getattr(made, part).shape for part in made.__tensor_flatten__()[0]
            ]
            if key in truth:
                assert torch.equal(bits(made.dequantize()), bits(truth[key]))
                compared += 1
    assert compared >= 2


@pytest.mark.parametrize("folder", CARRIED)
def test_it_is_the_tensor_that_todays_torchao_makes_with_that_scheme(folder: str) -> None:
    """The same attributes and the same inner tensors: only codes and scales are older."""
    file, tensors, truth = quantized(folder)
    with file:
        name = next(name for name in tensors if name in truth)
        outcome = decide(tensors[name], file.read)
        made: Any = outcome.make(file.read)
    assert outcome.scheme is not None
    scheme = schemes.get(
        outcome.scheme.name, group_size=outcome.scheme.group_size, settings=dict(outcome.scheme.settings)
    )
    today: Any = scheme.quantize(truth[name].clone())
    (parts, context), (todays, wanted) = made.__tensor_flatten__(), today.__tensor_flatten__()
    assert (parts, str(context)) == (todays, str(wanted))
    assert [getattr(made, part).shape for part in parts] == [getattr(today, part).shape for part in parts]


@pytest.mark.parametrize("folder", DEQUANTIZED)
def test_what_has_no_class_today_is_dequantized(folder: str) -> None:
    file, tensors, truth = quantized(folder)
    with file:
        for name, tensor in tensors.items():
            outcome = decide(tensor, file.read)
            assert outcome.scheme is None
            assert DEQUANTIZED[folder] in (outcome.reason or "")
            made = outcome.make(file.read)
            assert type(made) is torch.Tensor
            assert torch.equal(bits(made), bits(truth[name]))


@pytest.mark.parametrize("folder", PACKED)
def test_packed_int4_keeps_its_bytes(folder: str) -> None:
    """They mean what the old release computed with them: codes and scales, by torchao's own arithmetic."""
    from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

    kind, device, packing = PACKED[folder]
    with OldFile(LEGACY / folder / "model.bin") as file:
        truth, source = (LEGACY / folder / f"{name}.safetensors" for name in ("dequant", "source"))
        values = load_file(truth) if truth.exists() else {}
        for name, tensor in file.tensors.items():
            if tensor.data is not None:
                continue
            outcome = decide(tensor, file.read, "avx512")
            made: Any = outcome.make(file.read)
            assert (type(made).__name__, outcome.packing) == (kind, packing)
            assert outcome.scheme == SchemeName("int4wo", 32, layout_device=device)
            parts = take_apart(made, "avx512" if device == "cpu" else None)
            found = _dequantize_affine_tinygemm(
                parts.codes, (1, 32), parts.scale.contiguous(), parts.zero.contiguous(), torch.uint8, 0, 15,
                output_dtype=made.dtype,
            )  # fmt: skip
            if name in values:
                assert torch.equal(bits(found), bits(values[name]))
            else:
                assert folder.startswith("torchao-0.14.1"), "the one release that could not compute it"
    assert not source.exists()


@pytest.mark.parametrize("folder", [folder for folder, (_, device, _) in PACKED.items() if device == "cpu"])
def test_packed_for_a_cpu_that_nobody_names(folder: str) -> None:
    with OldFile(LEGACY / folder / "model.bin") as file:
        tensor = next(tensor for tensor in file.tensors.values() if tensor.data is None)
        with pytest.raises(CannotMigrate, match="the packing depends on the machine that packed it") as caught:
            decide(tensor, file.read)
    assert caught.value.hint is not None
    assert "--packed-on avx512, avx2 or generic" in caught.value.hint


@pytest.mark.parametrize("bits_", range(3, 8))
def test_floats_of_few_bits_in_their_tiles(bits_: int) -> None:
    """Each value once, at its place: a packed matrix with a single value in it holds that value there alone."""
    torch.manual_seed(bits_)
    packed = torch.randint(0, 256, (128, 128 * bits_ // 8), dtype=torch.uint8)
    values = floatx_packing.unpack(packed, bits_)
    assert (values.shape, int(values.max()) >> bits_) == ((128, 128), 0)
    set_bits = sum(((values >> bit) & 1).sum() for bit in range(bits_))
    assert set_bits == sum(((packed >> bit) & 1).sum() for bit in range(8))
    seen = torch.zeros(128, 128, dtype=torch.int32)
    for place in range(0, packed.numel(), 97):
        one = torch.zeros_like(packed).flatten()
        one[place] = 255
        seen += (floatx_packing.unpack(one.view_as(packed), bits_) != 0).int()
    assert int(seen.max()) <= bits_
    with pytest.raises(ValueError, match="does not hold values of"):
        floatx_packing.unpack(packed[:, :-1], bits_)


# --- whole folders

SQNR = {"int8wo": 40.0, "float8wo_e4m3": 40.0, "int8dq": 25.0}  # dB, of the outputs; measured: see the test


def model_of(folder: Path) -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def forward(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 8, 64, dtype=torch.bfloat16),
        "timestep": torch.tensor([7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0].float()


def original(folder: Path) -> Any:
    """The model with the values that the old release computed, not quantized."""
    from diffusers import PixArtTransformer2DModel

    config = json.loads((folder / "config.json").read_text())
    model = PixArtTransformer2DModel.from_config(config).to(torch.bfloat16)
    with OldFile(folder / "diffusion_pytorch_model.bin") as file:
        state = {}
        for name, tensor in file.tensors.items():
            made: Any = file.read(tensor) if tensor.data is not None else decide(tensor, file.read).make(file.read)
            state[name] = made.dequantize() if tensor.data is None else made
    truth = load_file(folder / "dequant.safetensors")
    assert truth
    assert all(torch.equal(state[name], value) for name, value in truth.items())
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("scheme", SQNR)
def test_a_diffusers_folder_opens_again(scheme: str, tmp_path: Path) -> None:
    done = aoconvert.migrate(DIFFUSERS / scheme, output=tmp_path / "out")
    assert done.counts == {"carried": 16, "dequantized": 0, "requantized": 0, "unchanged": 20}
    model = model_of(done.output)
    state = model.state_dict()
    truth = load_file(DIFFUSERS / scheme / "dequant.safetensors")
    assert all(torch.equal(bits(state[name].dequantize()), bits(value)) for name, value in truth.items())
    wanted, found = forward(original(DIFFUSERS / scheme)), forward(model)
    sqnr = 20 * torch.log10(wanted.norm() / (found - wanted).norm())
    assert sqnr > SQNR[scheme]


def test_config_and_manifest_are_those_of_today(tmp_path: Path) -> None:
    done = aoconvert.migrate(DIFFUSERS / "int8dq", output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_type"]["default"]["_type"] == "Int8DynamicActivationInt8WeightConfig"
    manifest = manifests.load(tmp_path / "out")
    [part] = manifest.components
    assert (part.scheme, part.dtype, part.loads_with["torchao"]) == ("int8dq", "bfloat16", ">=0.15")
    assert part.migrated is not None
    assert (part.migrated.kind, part.migrated.scheme) == ("torchao", "int8dq")
    assert part.migrated.written_by == "torchao 0.7 to 0.17"
    assert {tensor.migration for tensor in part.tensors if tensor.action == "quantize"} == {"carried"}
    assert {tensor.migration for tensor in part.tensors if tensor.action == "keep"} == {None}
    assert len(part.migrated.deviations) == 16
    assert {item.max_abs_error for item in part.migrated.deviations} == {0.0}
    assert [file.path for file in manifest.source.files] == ["diffusion_pytorch_model.bin"]
    assert manifest.run.command == "aoconvert migrate int8dq"
    assert done.to_dict()["kind"] == "torchao"
    card = aoconvert.card(done.output).text
    assert "Migrated from an old torchao checkpoint (`int8dq`, torchao 0.7 to 0.17): 16 tensors with the same" in card
    assert "- 16 tensors: its codes and scales are the same; activations are rounded slightly differently" in card
    assert "the error of the weights is not known" in card
    again = aoconvert.migrate(DIFFUSERS / "int8dq", output=tmp_path / "again")
    weights = "diffusion_pytorch_model.bin"
    assert (done.output / weights).read_bytes() == (again.output / weights).read_bytes()


def test_rows_without_a_scale_stand_for_zeros(tmp_path: Path) -> None:
    """torchao gave a row of zeros the scale 0 and the codes 0 / 0: it loaded as NaN."""
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    weight[3] = 0
    save_old_float8({"layer.weight": weight}, tmp_path / "old.bin")
    with OldFile(tmp_path / "old.bin") as file:
        made: Any = decide(file.tensors["layer.weight"], file.read).make(file.read)
        assert torch.isnan(made.dequantize()[3]).all()
    done = aoconvert.migrate(tmp_path / "old.bin", output=tmp_path / "out")
    [item] = done.deviations
    assert item.reason == "1 of its scales were 0, so that their values were NaN: they stand for zeros now"
    assert done.manifest.components[0].tensors[0].repaired_rows == 1
    repaired: Any = torch.load(tmp_path / "out" / "old.bin", weights_only=True)["layer.weight"]
    assert not repaired.dequantize()[3].any()
    rest = [row for row in range(64) if row != 3]
    assert torch.equal(repaired.dequantize()[rest], made.dequantize()[rest])


def old_llama(folder: Path, **options: Any) -> Path:
    """A Llama as transformers wrote it with old torchao."""
    tensors = llama_tensors()
    build_llama(folder, tensors=tensors)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    (folder / "config.json").write_text(json.dumps(config))
    names = frozenset(name for name in tensors if name.endswith("_proj.weight"))
    save_old(tensors, folder / "pytorch_model.bin", names, **options)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_a_transformers_folder_of_any_age(tmp_path: Path, zipped: bool) -> None:
    from transformers import AutoModelForCausalLM

    source = old_llama(tmp_path / "old", _use_new_zipfile_serialization=zipped)
    done = aoconvert.migrate(source, output=tmp_path / "out")
    assert done.counts["carried"] == 14
    model = AutoModelForCausalLM.from_pretrained(done.output)
    with OldFile(source / "pytorch_model.bin") as file:
        for name, tensor in file.tensors.items():
            made = model.state_dict()[name]
            if tensor.data is None:
                impl = tensor.inner["tensor_impl"]
                assert torch.equal(made.qdata, file.read(impl.inner["int_data"]))
                assert torch.equal(made.scale.flatten(), file.read(impl.inner["scale"]))
            else:
                assert torch.equal(made, file.read(tensor))
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_only_the_quantized_part_of_a_pipeline_is_written_anew(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import CogVideoXPipeline

    source = tmp_path / "old"
    shutil.copytree(pipeline, source)
    folder = source / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = frozenset(name for name in tensors if name.endswith((".to_q.weight", ".to_k.weight")))
    save_old(tensors, folder / "diffusion_pytorch_model.bin", names)
    done = aoconvert.migrate(source, output=tmp_path / "out")
    assert [part.name for part in done.manifest.components] == ["transformer"]
    assert done.manifest.unquantized
    pipe = CogVideoXPipeline.from_pretrained(done.output, torch_dtype=torch.bfloat16)
    kinds = {name: type(value).__name__ for name, value in pipe.transformer.state_dict().items()}
    assert {name for name, kind in kinds.items() if kind == "Int8Tensor"} == names
    assert aoconvert.verify(done.output, reload=False).ok


def old_fp6(folder: Path) -> Path:
    """A Llama with its feed-forward weights in float6, whose codes are taken from a file of torchao 0.5."""
    with OldFile(LEGACY / "torchao-0.5.0" / "fp6_e3m2" / "model.bin") as file:
        weight = next(tensor for tensor in file.tensors.values() if tensor.data is None)
        impl = weight.inner["layout_tensor"]
        packed, scale = file.read(impl.inner["packed_fpx_data"]), file.read(impl.inner["scale"])
    rows, columns = weight.shape
    shape = {"hidden_size": columns, "intermediate_size": rows, "num_hidden_layers": 1}
    build_llama(folder, **shape)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": "fpx_weight_only"}
    (folder / "config.json").write_text(json.dumps(config))
    save_fp6(tensors, folder / "pytorch_model.bin", "model.layers.0.mlp.gate_proj.weight", packed, scale)
    return folder


def test_what_has_no_class_is_quantized_again_only_when_asked_to(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, name = old_fp6(tmp_path / "old"), "model.layers.0.mlp.gate_proj.weight"
    truth = load_file(LEGACY / "torchao-0.5.0" / "fp6_e3m2" / "dequant.safetensors")
    plain = aoconvert.migrate(source, output=tmp_path / "plain")
    [item] = plain.deviations
    assert (plain.counts["dequantized"], plain.counts["requantized"]) == (1, 0)
    assert (item.name, item.max_abs_error) == (name, 0.0)
    weight = torch.load(plain.output / "pytorch_model.bin", weights_only=True)[name]
    assert any(torch.equal(bits(weight), bits(value)) for value in truth.values())
    assert "quantization_config" not in json.loads((plain.output / "config.json").read_text())
    assert "its weights in bfloat16, dequantized from an old checkpoint" in aoconvert.card(plain.output).text
    assert aoconvert.verify(plain.output, reload=False).ok
    opened = AutoModelForCausalLM.from_pretrained(plain.output)
    assert torch.equal(opened.state_dict()[name], weight)

    again = aoconvert.migrate(source, output=tmp_path / "again", then="int8wo")
    [item] = again.deviations
    assert (again.counts["dequantized"], again.counts["requantized"]) == (0, 1)
    made: Any = torch.load(again.output / "pytorch_model.bin", weights_only=True)[name]
    assert torch.equal(made.qdata, schemes.get("int8wo").quantize(weight).qdata)  # type: ignore[attr-defined]
    assert item.max_abs_error == float((made.dequantize().float() - weight.float()).abs().max()) > 0
    assert again.manifest.run.command == "aoconvert migrate old --then int8wo"
    assert again.manifest.components[0].scheme == "int8wo"
    assert "1 tensor quantized again" in aoconvert.card(again.output).text


# --- a file without a model

TOYS = [folder for folder in (*CARRIED, *DEQUANTIZED, *PACKED) if not folder.startswith("diffusers")]
COVERING = [
    "torchao-0.6.1/int8dq",
    "torchao-0.10.0/uint3wo_g64",
    "torchao-0.5.0/fp6_e3m2",
    "torchao-0.10.0/int4wo_cpu_g32",
]


class Toy(torch.nn.Module):
    """The module that the files of tests/fixtures/legacy/torchao-* are of, as their tensors say."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = dict(module.named_children())[part]
            module.register_parameter(leaf, torch.nn.Parameter(torch.empty(value.shape, device="meta")))


def check_toy(folder: str, output: Path) -> None:
    """It loads by assignment, and stands for what the old release computed."""
    done = aoconvert.migrate(LEGACY / folder / "model.bin", output=output, packed_on="avx512")
    [part] = done.manifest.components
    state: dict[str, Any] = torch.load(output / "model.bin", weights_only=True, mmap=True)
    model = Toy(state)
    model.load_state_dict(state, assign=True)
    truth = (
        load_file(LEGACY / folder / "dequant.safetensors") if folder != "torchao-0.14.1/int4wo_v2_opaque_g32" else {}
    )
    for name, value in truth.items():
        found: Any = model.state_dict()[name]
        if "Int4" in type(found).__name__:
            continue  # see test_packed_int4_keeps_its_bytes
        assert torch.equal(bits(found.dequantize() if hasattr(found, "qdata") else found), bits(value))
    migrated = {entry.migration for entry in part.tensors if entry.migration}
    assert migrated == ({"dequantized"} if folder in DEQUANTIZED else {"carried"})
    assert manifests.load(output).source.kind == "file"


@pytest.mark.parametrize("folder", COVERING)
def test_a_file_alone(folder: str, tmp_path: Path) -> None:
    check_toy(folder, tmp_path / "out")


@pytest.mark.exhaustive
@pytest.mark.parametrize("folder", [folder for folder in TOYS if folder not in COVERING])
def test_every_file_alone(folder: str, tmp_path: Path) -> None:
    if folder == "torchao-0.15.0/float8dq_e4m3_perrow_v2":  # it has all that 0.18 writes
        with pytest.raises(PlanError, match="nothing to migrate"):
            aoconvert.migrate(LEGACY / folder / "model.bin", output=tmp_path / "out")
        return
    check_toy(folder, tmp_path / "out")


def test_a_file_alone_is_verified_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = LEGACY / "torchao-0.10.0" / "int8wo"  # without a config, with one torch file
    done = aoconvert.migrate(folder, output=tmp_path / "out")
    report = aoconvert.verify(done.output)
    assert report.ok
    assert {check.name: check.status for check in report.checks} == {
        **dict.fromkeys(("manifest", "files", "pickle", "versions", "load", "numbers"), "passed"),
        **dict.fromkeys(("reload", "library", "forward"), "skipped"),
    }
    with pytest.raises(SourceError, match="is a file of tensors alone: nothing says which model it is for"):
        aoconvert.card(done.output)
    weights = bytearray((done.output / "model.bin").read_bytes())
    weights[len(weights) // 3] ^= 1
    (done.output / "model.bin").write_bytes(weights)
    assert not aoconvert.verify(done.output, reload=False).ok


# --- memory

LARGE = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 4, "num_attention_heads": 32}


@pytest.mark.exhaustive
def test_a_file_of_a_gigabyte_takes_the_memory_of_its_largest_tensor(tmp_path: Path) -> None:
    """1.07 GB of int8 weights, the largest of 67 MB; the rest is what the imports take."""
    source = tmp_path / "old"
    config = {**LLAMA, **LARGE, "num_key_value_heads": 32}
    shapes = llama_shapes(config)
    names = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    write_config(source, {**config, "quantization_config": {"quant_method": "torchao", "quant_type": "int8wo"}})
    plain = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items() if name not in names}
    save_codes(names, plain, source / "pytorch_model.bin")  # type: ignore[arg-type]
    assert (source / "pytorch_model.bin").stat().st_size > 10**9
    script = (
        "import sys, aoconvert\n"
        "done = aoconvert.migrate(sys.argv[1], output=sys.argv[2])\n"
        "print(done.counts['carried'])\n"
        "print([int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    carried, peak = map(int, done.stdout.split()[-2:])
    assert carried == 28
    assert peak * 1024 < 900 * 10**6


# --- what cannot be


def test_nothing_to_migrate(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="holds no weights that torchao or Quanto quantized"):
        aoconvert.migrate(build_llama(tmp_path / "plain"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = aoconvert.migrate(DIFFUSERS / "int8wo", output=tmp_path / "new")
    with pytest.raises(PlanError, match="is in today's tensor classes already: there is nothing to migrate"):
        aoconvert.migrate(done.output, output=tmp_path / "out")


def test_a_file_that_is_no_torch_file(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"x\.safetensors is one safetensors file"):
        aoconvert.migrate(tmp_path / "x.safetensors", output=tmp_path / "out")
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "x.bin")
    with pytest.raises(PlanError, match=r"x\.bin holds no tensor that torchao quantized"):
        aoconvert.migrate(tmp_path / "x.bin", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def test_a_hostile_pickle_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2, 2), "other": Payload()}, tmp_path / "x.bin")
    with pytest.raises(UnsafePickleError, match=r"posix\.system is not a name that a checkpoint may use"):
        aoconvert.migrate("x.bin", output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin"]


def test_problems_are_named_all_at_once(tmp_path: Path) -> None:
    """Every tensor without a counterpart, and the output that is in the way."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(PlanError) as caught:
        aoconvert.migrate(LEGACY / "torchao-0.10.0/int4wo_cpu_g32", output=tmp_path / "elsewhere")
    assert len(caught.value.problems) == 4
    assert "blocks.0.attn.to_q.weight: int4 packed for a CPU" in caught.value.problems[0]
    with pytest.raises(PlanError, match="exists and is not empty"):
        aoconvert.migrate(LEGACY / "torchao-0.10.0/int8wo", output=tmp_path / "out")


def test_a_scheme_that_does_not_exist_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no scheme 'int9wo'"):
        aoconvert.migrate(tmp_path / "absent", then="int9wo")


def test_an_unknown_class_is_named(tmp_path: Path) -> None:
    file, tensors, _ = quantized("torchao-0.10.0/int8wo")
    with file:
        tensor = next(iter(tensors.values()))
        gone = "torchao.dtypes.uintx.gemlite_layout.GemliteAQTTensorImpl"
        other = replace(tensor, inner={"tensor_impl": replace(tensor.inner["tensor_impl"], class_name=gone)})
        with pytest.raises(CannotMigrate, match="no class of today is known to hold the values of a GemliteAQT"):
            decide(other, file.read)
