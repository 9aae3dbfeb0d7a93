"""Empty models: every tensor as the loaded model has it, ties, float32 parts, names, and classes that do not exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from safetensors import safe_open

import aoconvert
from aoconvert.errors import SourceError
from aoconvert.models import build_skeleton, identify
from aoconvert.models import transformers as transformers_models
from aoconvert.sources import resolve


def skeleton_of(folder: Path, name: str = "", dtype: torch.dtype = torch.bfloat16) -> Any:
    layout = identify(resolve(str(folder)))
    component = layout.component(name)
    assert component is not None
    return build_skeleton(component, dtype)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_tensors_are_those_of_the_loaded_model(name: str, checkpoints: Callable[[str], Path]) -> None:
    family = tiny.FAMILIES[name]
    skeleton = skeleton_of(checkpoints(name), family.component)
    opened = tiny.open_result(family, checkpoints(name))
    model = getattr(opened, family.component) if family.component else opened
    expected = model.state_dict()
    assert [spec.name for spec in skeleton] == list(expected)
    assert {spec.name: spec.shape for spec in skeleton} == {key: tuple(value.shape) for key, value in expected.items()}
    linear = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {spec.name for spec in skeleton if spec.kind == "linear"} == linear
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    assert {spec.name for spec in skeleton if spec.parameter} == parameters
    assert all(tensor.is_meta for tensor in (*skeleton.model.parameters(), *skeleton.model.buffers()))


@pytest.mark.parametrize("name", ["wan", "cogvideox", "sd3"])
def test_float32_parts_are_those_that_diffusers_keeps(name: str, checkpoints: Callable[[str], Path]) -> None:
    skeleton = skeleton_of(checkpoints(name), "transformer")
    opened = tiny.open_result(tiny.FAMILIES[name], checkpoints(name))
    kept = {key for key, value in opened.transformer.state_dict().items() if value.dtype == torch.float32}
    assert {spec.name for spec in skeleton if spec.keep_fp32} == kept
    assert bool(kept) == (name == "wan")


def test_t5_keeps_wo_in_float32_below_float16_only(checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints("t5")
    assert not any(spec.keep_fp32 for spec in skeleton_of(folder, dtype=torch.bfloat16))
    kept = {spec.name for spec in skeleton_of(folder, dtype=torch.float16) if spec.keep_fp32}
    loaded = tiny.transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.float16).state_dict()
    assert kept == {name for name, tensor in loaded.items() if tensor.dtype == torch.float32}
    assert kept


@pytest.mark.parametrize(
    ("name", "component"),
    [("t5", ""), ("cogvideox", "text_encoder"), pytest.param("wan", "text_encoder", marks=pytest.mark.exhaustive)],
)
def test_what_a_class_wants_in_float32_is_left_alone_by_a_hint(
    name: str, component: str, checkpoints: Callable[[str], Path]
) -> None:
    """T5's ``wo``: the loader keeps it in float32 for float16 alone, the hint does not depend on that."""
    skeleton = skeleton_of(checkpoints(name), component, dtype=torch.bfloat16)
    hinted = {spec.name: spec.hint for spec in skeleton if spec.hint and spec.kind == "linear"}
    assert set(hinted) == {spec.name for spec in skeleton if spec.name.endswith(".wo.weight")}
    assert set(hinted.values()) == {"its class lists it in _keep_in_fp32_modules"}


@pytest.mark.parametrize("name", ["llama-tied", "opt", "flux", "bert"])
def test_hints_are_few(name: str, checkpoints: Callable[[str], Path]) -> None:
    """Of a transformer nothing, of a language model its head."""
    skeleton = skeleton_of(checkpoints(name), tiny.FAMILIES[name].component)
    hinted = {spec.name: spec.hint for spec in skeleton if spec.hint and spec.kind == "linear"}
    assert hinted == ({"lm_head.weight": "output head"} if name in ("llama-tied", "opt") else {})


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("bert", {"embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"}),
        ("t5", {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}),
        ("opt", {"model.decoder.embed_positions.weight"}),
        ("llama-tied", set()),
    ],
)
def test_tables_beside_the_input_embeddings(name: str, others: set[str], checkpoints: Callable[[str], Path]) -> None:
    tables = {spec.name: spec.hint for spec in skeleton_of(checkpoints(name)) if spec.kind == "embedding"}
    assert {table for table, hint in tables.items() if hint == "not the input embeddings"} == others
    assert set(tables.values()) - {"not the input embeddings"} == {None}


def test_convolutions_of_any_class(checkpoints: Callable[[str], Path]) -> None:
    found = {spec.module_class for spec in skeleton_of(checkpoints("cogvideox"), "vae") if spec.convolution}
    assert found == {"Conv2d", "CogVideoXSafeConv3d"}
    assert all(spec.kind == "other" for spec in skeleton_of(checkpoints("cogvideox"), "vae") if spec.convolution)


def test_the_parts_of_a_normed_weight_are_no_experts(tmp_path: Path) -> None:
    """torch keeps them in a list of as many modules as the direction of a convolution with one output has rows."""
    config = tiny.transformers.EncodecConfig(
        num_filters=2, upsampling_ratios=[2, 2], codebook_size=16, codebook_dim=8, hidden_size=8
    )
    tiny.transformers.EncodecModel(config).save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path, dtype=torch.float32)
    normed = [spec for spec in skeleton if ".parametrizations." in spec.name]
    assert any(spec.shape[0] == 1 and len(spec.shape) == 3 for spec in normed)
    assert {spec.kind for spec in normed} == {"other"}


def test_ties(checkpoints: Callable[[str], Path]) -> None:
    tied = {spec.name: spec.tied_to for spec in skeleton_of(checkpoints("llama-tied")) if spec.tied_to}
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("name", ["llama-tied", "opt", "t5", "mixtral", "qwen2-moe", "bert"])
def test_names_lead_to_the_same_values(name: str, checkpoints: Callable[[str], Path]) -> None:
    """Names that are only renamed are read directly: from_pretrained finds the same values under them."""
    family = tiny.FAMILIES[name]
    folder = checkpoints(name)
    skeleton = skeleton_of(folder)
    loaded = getattr(tiny.transformers, family.opener).from_pretrained(folder).state_dict()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = transformers_models.source_names(skeleton, file.keys())
        for key, origin in names.direct.items():
            assert torch.equal(loaded[key], file.get_tensor(origin).to(loaded[key].dtype)), key
    tied = {spec.name for spec in skeleton if spec.tied_to}
    assert set(names.direct) | names.merged | tied == set(loaded)
    assert not set(names.direct) & names.merged
    experts = {key for key in loaded if key.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert names.merged == experts
    assert bool(experts) == (name in ("mixtral", "qwen2-moe"))


def test_old_attention_names_of_a_vae(tmp_path: Path) -> None:
    """Checkpoints from before diffusers renamed its attention blocks: ``query`` is ``to_q`` now."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "vae"
    tiny.image_vae().save_pretrained(source)
    path = source / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    save_file(renamed, path, metadata={"format": "pt"})
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", min_quantized=0, device="cpu")
    written = torch.load(tmp_path / "out/diffusion_pytorch_model.bin", weights_only=True)
    assert set(written) == set(tensors)
    assert result.quantized_parameters == sum(t.numel() for n, t in tensors.items() if ".to_" in n and t.dim() == 2)


def test_code_in_the_checkpoint_runs_only_when_trusted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.llama(source)
    canary = tmp_path / "canary"
    (source / "modeling_own.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaForCausalLM\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["OwnForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="code inside the checkpoint") as caught:
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert "--trust-remote-code" in (caught.value.hint or "")
    assert not canary.exists()
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", trust_remote_code=True)
    assert canary.exists()
    assert result.manifest.components[0].class_name == "OwnForCausalLM"
    assert (tmp_path / "out" / "modeling_own.py").exists()
    opened = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(opened).__name__ == "OwnForCausalLM"
    assert tiny.tokens_step(opened).isfinite().all()


@pytest.mark.parametrize("key", ["architectures", "_class_name"])
def test_a_class_that_does_not_exist(key: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    value: Any = ["NoSuchModel"] if key == "architectures" else "NoSuchModel"
    (tmp_path / "config.json").write_text(json.dumps({key: value, "model_type": "llama"}))
    with pytest.raises(SourceError, match="has no model class 'NoSuchModel'"):
        skeleton_of(tmp_path)


@pytest.mark.parametrize("name", ["torch", "AutoModel", "DiffusionPipeline", "load_image", "FluxPipeline"])
def test_a_name_that_is_no_model_class(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(SourceError, match=f"has no model class '{name}'"):
        skeleton_of(tmp_path)


def test_a_config_that_the_class_refuses(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", "num_attention_heads": "many"})
    )
    with pytest.raises(SourceError, match=r"does not accept its config\.json"):
        skeleton_of(tmp_path)
