"""A LoRA that is added before quantizing gives what its own library gives by fusing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from fake_hub.fixtures import HubClient
from helpers import tiny
from helpers.authors_names import MODELS
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.errors import PlanError, SourceError, UsageError
from aoconvert.planning import Plan

peft = pytest.importorskip("peft")

Make = Callable[..., Path]


def hashes(output: Path) -> dict[str, str]:
    manifest = json.loads((output / "aoconvert.json").read_text())
    return {tensor["name"]: tensor["sha256"] for component in manifest["components"] for tensor in component["tensors"]}


def convert(source: Path, output: Path, **options: Any) -> Any:
    return aoconvert.quantize(source, "int8wo", output=output, min_quantized=0, device="cpu", **options)


def plan(source: Path, **options: Any) -> Plan:
    return aoconvert.plan(source, "int8wo", min_quantized=0, device="cpu", **options)


def fill(model: Any, seed: int = 1) -> None:
    """Give the LoRA layers values: B begins as zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def sd3(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = tiny.sd3_transformer().to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def denoiser(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A float32 denoiser; a LoRA of it as diffusers saves it, with ranks and alphas of its own; the fused folder."""
    model = sd3(tmp_path / "source")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "add_v_proj", "proj", "linear_1", "proj_out"],
        rank_pattern={"to_k": 2},
        alpha_pattern={"to_q": 3.0},
    )
    model.add_adapter(config)
    fill(model)
    model.save_lora_adapter(tmp_path / "lora")
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path / "fused")
    return tmp_path / "source", tmp_path / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "fused"


def test_the_same_bytes_as_diffusers_fused_model(denoiser: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, lora, fused = denoiser
    convert(fused, tmp_path / "from-fused")
    result = convert(source, tmp_path / "from-lora", lora=str(lora))
    assert hashes(tmp_path / "from-lora") == hashes(tmp_path / "from-fused")
    [entry] = result.manifest.source.loras
    assert (entry.path, entry.weight, entry.repo_id) == (lora.name, 1.0, None)
    assert entry.tensors == 13
    assert f"--lora {lora.name}" in result.manifest.run.command
    card = aoconvert.card(tmp_path / "from-lora").text
    assert f"- LoRA: `{lora.name}`, weight 1, added to {entry.tensors} tensors in float32" in card
    assert f"--lora {lora.name}" in card


def test_slices_give_the_same(
    denoiser: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, lora, fused = denoiser
    monkeypatch.setattr("aoconvert.planning.slices.SLICE_BYTES", 64 * 4 * 3)
    convert(source, tmp_path / "sliced", lora=str(lora))
    monkeypatch.undo()
    convert(fused, tmp_path / "from-fused")
    assert hashes(tmp_path / "sliced") == hashes(tmp_path / "from-fused")


def test_weights_and_two_loras(tmp_path: Path) -> None:
    model = sd3(tmp_path / "source")
    for name, seed in (("one", 1), ("two", 2)):
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=5, target_modules=["to_q", "to_v"]), adapter_name=name)
        fill(model, seed)
        model.save_lora_adapter(tmp_path / name, adapter_name=name)
        model.delete_adapters(name)
    for name in ("one", "two"):
        file = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}
        model.load_lora_adapter(str(tmp_path / name), prefix=None, adapter_name=name, **file)
    model.set_adapters(["one", "two"], weights=[0.5, -1.25])
    model.fuse_lora(adapter_names=["one", "two"])
    model.unload_lora()
    model.save_pretrained(tmp_path / "fused")
    result = convert(tmp_path / "source", tmp_path / "out", lora=[f"{tmp_path}/one@0.5", f"{tmp_path}/two@-1.25"])
    convert(tmp_path / "fused", tmp_path / "from-fused")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "from-fused")
    assert [entry.weight for entry in result.manifest.source.loras] == [0.5, -1.25]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_same_bytes_as_pefts_merged_model(tmp_path: Path, rslora: bool) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    source = transformers.GPT2LMHeadModel(config)
    source.save_pretrained(tmp_path / "source")
    patterns = {} if rslora else {"rank_pattern": {"h.1.attn.c_attn": 6}, "alpha_pattern": {"mlp.c_fc": 5}}
    lora = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["c_attn", "c_fc", "c_proj"], use_rslora=rslora, **patterns
    )
    model = peft.get_peft_model(source, lora)
    fill(model)
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "fused")
    options = {"dtype": "float32", "untie": True, "default_skips": False}  # torchao quantizes no Conv1D
    convert(tmp_path / "source", tmp_path / "out", lora=str(tmp_path / "lora"), **options)
    convert(tmp_path / "fused", tmp_path / "from-fused", **options)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "from-fused")


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, _ = MODELS["sdxl"]
    model = make()
    model.save_pretrained(tmp_path / "source")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1", "conv_shortcut", "conv_in"]))
    fill(model)
    model.save_lora_adapter(tmp_path / "lora")
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path / "fused")
    convert(tmp_path / "source", tmp_path / "out", lora=str(tmp_path / "lora"))
    convert(tmp_path / "fused", tmp_path / "from-fused")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "from-fused")


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    """diffusers rounds what it adds to bfloat16, and then the sum; here only the sum is rounded."""
    model = sd3(tmp_path / "source", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"]))
    fill(model)
    model.save_lora_adapter(tmp_path / "lora")
    state = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    made = plan(tmp_path / "source", lora=str(tmp_path / "lora"))
    assert any("rounds more often" in warning for warning in made.warnings)
    from aoconvert.engine.read import ComponentReading

    [component] = made.components
    with ComponentReading(component, made, tmp_path) as reading:
        for tensor in component.tensors:
            read = reading.read(tensor, None, None)
            layer = tensor.name.removesuffix(".weight")
            if not layer.endswith("to_q"):
                assert torch.equal(read, before[tensor.name])
                continue
            a, b = (state[next(k for k in state if f"{layer}.lora_{part}." in k)].float() for part in "AB")
            assert read.dtype == torch.float32
            assert torch.equal(read, before[tensor.name].float() + (b @ a) * (6 / 4))


def test_a_pipelines_lora(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    """Kohya's names, with alphas, by the pipeline's own conversion."""
    source = checkpoints("flux")
    pipe = diffusers.FluxPipeline.from_pretrained(source, torch_dtype=torch.float32)
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    torch.manual_seed(0)
    state = {
        "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.randn(4, width),
        "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.randn(4 * width, 4),
        "lora_unet_double_blocks_0_img_mlp_0.alpha": torch.tensor(2.0),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.randn(4, width),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.randn(3 * width, 4),
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(3.0),
    }
    save_file(state, tmp_path / "kohya.safetensors")
    pipe.transformer.save_pretrained(tmp_path / "source")
    shutil.copytree(source, tmp_path / "pipeline", ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(tmp_path / "source", tmp_path / "pipeline" / "transformer")
    pipe.load_lora_weights(str(tmp_path / "kohya.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path / "fused")
    convert(tmp_path / "pipeline", tmp_path / "out", component_only=True, lora=str(tmp_path / "kohya.safetensors"))
    convert(tmp_path / "fused", tmp_path / "from-fused")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "from-fused")


def test_verify_adds_it_too(denoiser: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, lora, _ = denoiser
    convert(source, tmp_path / "out", lora=f"{lora}@0.5")

    def numbers(**options: Any) -> Any:
        report = aoconvert.verify(tmp_path / "out", source=str(source), forward=False, reload=False, **options)
        return next(check for check in report.checks if check.name == "numbers")

    assert "--lora" in numbers().detail
    assert "tensors compared" in numbers(lora=str(lora)).detail
    state = load_file(lora)
    save_file({name: tensor + 1 for name, tensor in state.items()}, lora)
    assert numbers(lora=str(lora)).status == "failed"


def lora_file(place: Path, **tensors: torch.Tensor) -> str:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, place)
    return str(place)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sd3(source)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    a, b = torch.ones(2, 64), torch.ones(64, 2)

    def refused(error: type[Exception], match: str, **tensors: torch.Tensor) -> None:
        with pytest.raises(error, match=match):
            convert(source, tmp_path / "out", lora=lora_file(tmp_path / "lora.safetensors", **tensors))

    pair = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    other = {f"transformer.other.layer.lora_{part}.weight": tensor for part, tensor in (("A", a), ("B", b))}
    refused(PlanError, r"other.layer.lora_A.weight has no tensor in SD3Transformer2DModel", **pair, **other)
    wide = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": b}
    refused(PlanError, r"gives the shape \[64, 32\], the model has \[64, 64\]: a LoRA of another model", **wide)
    refused(PlanError, "one of the two matrices is missing", **{f"{layer}.lora_B.weight": b})
    refused(SourceError, "DoRA, which aoconvert does not merge", **pair, **{f"{layer}.lora_magnitude_vector": b[:, 0]})
    refused(SourceError, "LoHa, LoKr or OFT", **{f"{layer}.hada_w1_a": a})
    refused(SourceError, "holds no LoRA", **{f"{layer}.lora_A.weight": a})
    assert not (tmp_path / "out").exists()


def test_references(tmp_path: Path) -> None:
    from aoconvert.models.lora_files import split_weight

    assert split_weight("user/lora@0.8") == ("user/lora", 0.8)
    assert split_weight("user/lora@-1e-2") == ("user/lora", -0.01)
    assert split_weight(f"user/lora@{'1' * 40}") == (f"user/lora@{'1' * 40}", 1.0)
    assert split_weight("user/lora@main") == ("user/lora@main", 1.0)
    (tmp_path / "a@2").mkdir()
    assert split_weight(str(tmp_path / "a@2")) == (str(tmp_path / "a@2"), 1.0)
    with pytest.raises(UsageError, match="a weight of 0 changes nothing"):
        split_weight("user/lora@0")
    sd3(tmp_path / "source")
    with pytest.raises(SourceError, match="holds no weights file"):
        plan(tmp_path / "source", lora=str(tmp_path / "a@2"))
    for name in "xy":
        save_file({"z": torch.ones(1)}, tmp_path / "a@2" / f"{name}.safetensors")
    with pytest.raises(SourceError, match=r"holds several weights files: x.safetensors, y.safetensors"):
        plan(tmp_path / "source", lora=str(tmp_path / "a@2"))


@pytest.mark.exhaustive
def test_a_lora_of_the_hub_is_pinned(tmp_path: Path, hub_client: HubClient) -> None:
    sd3(tmp_path / "source")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    lora_file(tmp_path / "lora.safetensors", **tensors)
    hub_client.hub.state.create_repo("user/lora")
    sha = hub_client.hub.state.commit("user/lora", {"style.safetensors": (tmp_path / "lora.safetensors").read_bytes()})
    words = ["--scheme", "int8wo", "--min-quantized", "0", "-o", str(tmp_path / "out"), "--lora", "user/lora@0.5"]
    done = hub_client.command("quantize", str(tmp_path / "source"), *words)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "aoconvert.json").read_text())
    [entry] = manifest["source"]["loras"]
    assert (entry["repo_id"], entry["revision"], entry["path"]) == ("user/lora", sha, "style.safetensors")
    assert f"--lora user/lora/style.safetensors@{sha}@0.5" in manifest["run"]["command"]
    card = aoconvert.card(tmp_path / "out").text
    assert "base_model:\n- user/lora\n" in card
    assert f"--lora user/lora/style.safetensors@{sha}@0.5" in card


def test_names_by_kohyas_scripts_need_a_pipeline(tmp_path: Path) -> None:
    sd3(tmp_path / "source")
    layer = "lora_unet_joint_blocks_0_x_block_attn_proj"
    pair = {f"{layer}.lora_down.weight": torch.ones(2, 64), f"{layer}.lora_up.weight": torch.ones(64, 2)}
    with pytest.raises(SourceError, match="only a pipeline's own code converts") as found:
        convert(tmp_path / "source", tmp_path / "out", lora=lora_file(tmp_path / "kohya.safetensors", **pair))
    assert "quantize the folder of the whole pipeline" in str(found.value.hint)
    assert not (tmp_path / "out").exists()


def test_embeddings_and_biases(tmp_path: Path) -> None:
    """``lora_embedding_A`` and a bias of B are added; biases that PEFT trained beside the LoRA are refused by name."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")

    def train(name: str, table: bool = False, **settings: Any) -> Any:
        source = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "source")
        model = peft.get_peft_model(source, peft.LoraConfig(r=4, lora_alpha=7, **settings))
        fill(model)
        model.save_pretrained(tmp_path / name, save_embedding_layers=table)
        return model.merge_and_unload()

    train("lora", target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path / "fused")
    train("lora-bias", target_modules=["k_proj"], lora_bias=True).save_pretrained(tmp_path / "biased")
    for lora, whole in (("lora", "fused"), ("lora-bias", "biased")):
        convert(tmp_path / "source", tmp_path / f"out-{lora}", dtype="float32", lora=str(tmp_path / lora))
        convert(tmp_path / whole, tmp_path / f"from-{whole}", dtype="float32")
        assert hashes(tmp_path / f"out-{lora}") == hashes(tmp_path / f"from-{whole}")
    train("biases", target_modules=["q_proj"], bias="all")
    train("saved", target_modules=["q_proj"], modules_to_save=["lm_head"])
    train("whole", True, target_modules=["embed_tokens"])  # PEFT saves the table beside the LoRA, as it may have grown
    for lora, match in (
        ("biases", r"q_proj\.base_layer\.bias"),
        ("saved", "lm_head"),
        ("whole", "a full weight beside"),
    ):
        with pytest.raises((PlanError, SourceError), match=match):
            convert(tmp_path / "source", tmp_path / "out", lora=str(tmp_path / lora))
    assert not (tmp_path / "out").exists()
