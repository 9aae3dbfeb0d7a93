"""What is quantized, what is not and why, and that all problems are named at once."""

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import LLAMA, build_llama, llama_shapes, llama_tensors, write_config

import aoconvert
from aoconvert.errors import SourceError
from aoconvert.planning.types import Plan, TensorPlan


def decide(source: Path, tmp_path: Path, scheme: str = "int8wo", **options: object) -> dict[str, TensorPlan]:
    made: Plan = aoconvert.plan(source, scheme, output=tmp_path / "out", device="cpu", **options)
    return {tensor.name: tensor for tensor in made.components[0].tensors}


def problems(source: Path, tmp_path: Path, scheme: str = "int8wo", **options: object) -> tuple[str, ...]:
    options = {"output": tmp_path / "out", **options}
    with pytest.raises(aoconvert.PlanError) as caught:
        aoconvert.plan(source, scheme, device="cpu", **options)
    assert not any("\n" in line for line in caught.value.problems)
    return caught.value.problems


def test_skip(llama: Path, tmp_path: Path) -> None:
    patterns = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj", r"re:.*\.k_proj")
    made = decide(llama, tmp_path, skip=patterns)
    reasons = {name: tensor.reason for name, tensor in made.items() if (tensor.reason or "").startswith("--skip")}
    assert reasons == {
        "model.layers.0.self_attn.q_proj.weight": f"--skip {patterns[0]}",
        "model.layers.1.mlp.down_proj.weight": f"--skip {patterns[1]}",
        "model.layers.0.self_attn.k_proj.weight": f"--skip {patterns[2]}",
        "model.layers.1.self_attn.k_proj.weight": f"--skip {patterns[2]}",
    }
    for name in reasons:
        assert (made[name].action, made[name].bytes_out) == ("keep", made[name].bytes_in)


def test_skip_regex_is_a_full_match(llama: Path, tmp_path: Path) -> None:
    assert problems(llama, tmp_path, skip=("re:layers",)) == ("--skip 're:layers' matches nothing",)
    made = decide(llama, tmp_path, skip=("re:.*layers.0.*",), min_quantized=0.1)
    assert made["model.layers.0.mlp.up_proj.weight"].action == "keep"


def test_unmatched_skip_names_the_nearest(llama: Path, tmp_path: Path) -> None:
    (line,) = problems(llama, tmp_path, skip=("model.layers.0.self_attn.qproj",))
    assert "matches nothing" in line
    assert "model.layers.0.self_attn.q_proj" in line


def test_reasons_of_a_llama(llama: Path, tmp_path: Path) -> None:
    made = decide(llama, tmp_path)
    assert list(made) == list(llama_shapes(LLAMA))
    for name, tensor in made.items():
        assert (tensor.action == "quantize") == ("_proj." in name) == (tensor.reason is None), name
    assert made["lm_head.weight"].reason == "output head"
    assert made["model.embed_tokens.weight"].reason == "an embedding table"
    assert made["model.norm.weight"].reason == "LlamaRMSNorm: not the weight of a linear layer"


def test_group_size_that_does_not_divide(llama: Path, tmp_path: Path) -> None:
    made = decide(llama, tmp_path, "int4dq", group_size=64)
    down = made["model.layers.0.mlp.down_proj.weight"]
    assert (down.action, down.reason) == ("keep", "in_features 160 is not a multiple of group size 64")
    assert made["model.layers.0.mlp.up_proj.weight"].action == "quantize"
    (line,) = problems(llama, tmp_path, "int4dq", group_size=128)
    assert "would quantize 0%" in line
    assert "is not a multiple of group size 128" in line


def test_single_row_layers_stay_for_dynamic_int8(pipeline: Path, tmp_path: Path) -> None:
    weight_only, dynamic = decide(pipeline, tmp_path), decide(pipeline, tmp_path, "int8dq")
    for name in (
        "time_embedding.linear_1.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "norm_out.linear.weight",
    ):
        assert weight_only[name].action == "quantize"
        assert (dynamic[name].action, dynamic[name].reason) == (
            "keep",
            "sees one row per sample, which int8dq cannot run",
        )
    assert dynamic["transformer_blocks.0.attn1.to_q.weight"].action == "quantize"


def test_keep_in_float32(tmp_path: Path) -> None:
    """T5 wants its ``wo`` in float32 where the rest is float16; diffusers' Wan its time embedder, always."""
    config = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 1,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    write_config(tmp_path / "wan", config)
    made = decide(tmp_path / "wan", tmp_path)
    kept = [tensor for tensor in made.values() if tensor.reason == "the model class keeps it in float32"]
    assert kept
    for tensor in kept:
        assert tensor.name.startswith("condition_embedder.time_embedder")
        assert (tensor.action, tensor.dtype) == ("cast", "float32")
        assert tensor.bytes_out == 4 * tensor.numel
    assert made["blocks.0.attn1.to_q.weight"].action == "quantize"
    assert made["blocks.0.scale_shift_table"].action != "quantize"


def test_min_quantized(llama: Path, tmp_path: Path) -> None:
    skip = (r"re:.*mlp.*_proj",)
    (line,) = problems(llama, tmp_path, skip=skip)
    assert "less than --min-quantized 0.5" in line
    assert "6 matrices" not in line  # the output head is the seventh
    assert "7 matrices are left out" in line
    assert r"--skip re:.*mlp.*_proj" in line
    fraction = aoconvert.plan(llama, "int8wo", skip=skip, min_quantized=0.1, output=tmp_path / "out", device="cpu")
    totals = fraction.components[0].totals
    outside = {name: shape for name, shape in llama_shapes(LLAMA).items() if "embed" not in name}
    sizes = {name: torch.Size(shape).numel() for name, shape in outside.items()}
    quantized = sum(size for name, size in sizes.items() if "self_attn" in name)
    assert totals.quantized_parameters == quantized
    assert totals.quantized_fraction == pytest.approx(quantized / sum(sizes.values()))
    (line,) = problems(llama, tmp_path, skip=("re:.*_proj",), min_quantized=0)
    assert "nothing is left to quantize" in line


def test_all_problems_at_once(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    found = problems(
        llama, tmp_path, skip=("nothing", "re:nothing.*", "re:.*mlp.*"), components=["unet"], max_shard_size="1GB"
    )
    assert len(found) == 1  # without a component there is nothing that a pattern could match
    found = problems(llama, tmp_path, skip=("nothing", "re:nothing.*", "re:.*mlp.*"))
    assert len(found) == 3
    for line, part in zip(found, ("--min-quantized", "'nothing'", "'re:nothing.*'"), strict=True):
        assert part in line


def test_an_output_in_the_way_is_worth_a_note(llama: Path, tmp_path: Path) -> None:
    """A plan writes nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    plan = aoconvert.plan(llama, "int8wo", output=tmp_path / "out", device="cpu")
    assert any("exists and is not empty" in line for line in plan.warnings)
    with pytest.raises(aoconvert.PlanError, match="exists and is not empty"):
        aoconvert.quantize(llama, "int8wo", output=tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_unknown_and_repeated_components(pipeline: Path, tmp_path: Path) -> None:
    found = problems(pipeline, tmp_path, components=["unet", "scheduler"])
    assert [line.partition(":")[0] for line in found] == ["--component unet", "--component scheduler"]
    for line in found:
        assert all(name in line for name in ("transformer", "text_encoder", "vae"))
    (line,) = problems(pipeline, tmp_path, components=["transformer", "text_encoder"], component_only=True)
    assert line == "--component-only takes one component, not 2"


def test_only_what_can_be_fused_is_fused(pipeline: Path, tmp_path: Path) -> None:
    parts = ["transformer", "text_encoder"]
    plan = aoconvert.plan(
        pipeline, "int8wo", components=parts, fuse_qkv=True, output=tmp_path / "out", device="cpu", min_quantized=0
    )
    assert [bool(item.skeleton.fused) for item in plan.components] == [True, False]
    said = [line for line in plan.warnings if line.endswith("its projections stay separate")]
    assert [line.partition(":")[0] for line in said] == ["text_encoder"]
    for part, why in (("vae", "has no attention"), ("text_encoder", "only diffusers models")):
        with pytest.raises(SourceError, match=why):
            aoconvert.plan(pipeline, "int8wo", components=[part], fuse_qkv=True, output=tmp_path / "out", device="cpu")


def test_shapes_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.bfloat16)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.input_layernorm.weight"]
    tensors["extra.bias"] = torch.zeros(3)
    source = build_llama(tmp_path / "model", tensors=tensors)
    found = problems(source, tmp_path)
    assert found == (
        "LlamaForCausalLM: model.norm.weight has the shape [32] in model.safetensors, but its class expects [64]",
        "LlamaForCausalLM: the checkpoint does not hold model.layers.0.mlp.up_proj.weight, "
        "model.layers.1.input_layernorm.weight (--allow-missing PATTERN leaves a tensor to the library, which "
        "initializes it)",
    )
    source = build_llama(tmp_path / "other", tensors={**llama_tensors(), "extra.bias": torch.zeros(3)})
    made = aoconvert.plan(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert made.warnings == ("LlamaForCausalLM: 1 tensor unknown to its class, carried over unchanged: extra.bias",)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantized_already(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = llama_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    (line,) = problems(build_llama(tmp_path / "model", tensors=tensors), tmp_path)
    assert line == f"LlamaForCausalLM: {name} is already {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    tensors = {name: tensor.float() for name, tensor in llama_tensors().items()}
    source = build_llama(tmp_path / "model", tensors=tensors)
    made = decide(source, tmp_path, dtype=dtype)
    target = "float32" if dtype == "auto" else dtype
    for tensor in made.values():
        assert (tensor.source_dtype, tensor.dtype) == ("float32", target)
        if tensor.action != "quantize":
            assert tensor.action == ("keep" if target == "float32" else "cast")
            assert tensor.bytes_out == tensor.numel * (4 if target == "float32" else 2)


def test_skip_modules_of_diffusers_are_substrings(pipeline: Path, tmp_path: Path) -> None:
    """``transformer_blocks.1`` would also catch ``transformer_blocks.1x``; an exact parameter name catches itself."""
    names = ("transformer_blocks.0.attn1.to_q", "patch_embed.proj", "proj_out")
    made = aoconvert.plan(pipeline, "int8wo", skip=names[:1], output=tmp_path / "out", device="cpu")
    component = made.components[0]
    quantized = [tensor.name for tensor in component.tensors if tensor.action == "quantize"]
    assert names[0] in component.skip_modules
    for entry in component.skip_modules:
        assert not [name for name in quantized if entry in name], entry


def test_skip_modules_that_clash(tmp_path: Path) -> None:
    from aoconvert.models import ModelPart
    from aoconvert.planning.component import skip_modules

    def tensor(name: str, action: str) -> TensorPlan:
        return TensorPlan(
            name=name,
            shape=(4, 4),
            dtype="bfloat16",
            source_dtype="bfloat16",
            action=action,  # type: ignore[arg-type]
            reason=None,
            candidate=True,
            parameter=True,
            embedding=False,
            bytes_in=32,
            bytes_out=16,
        )

    tensors = [
        tensor("proj.weight", "keep"),
        tensor("block.proj.weight", "quantize"),
        tensor("alone.weight", "keep"),
        tensor("block.alone_too.weight", "quantize"),
    ]
    diffusers = ModelPart("", "", "diffusers", "X", {})
    assert skip_modules(diffusers, tensors) == ("proj.weight", "alone")
    transformers = ModelPart("", "", "transformers", "X", {})
    assert skip_modules(transformers, tensors) == ("proj", "alone")


def test_a_shared_tensor_under_any_of_its_names(tmp_path: Path) -> None:
    """T5's checkpoints name the shared embedding now as ``shared``, now as ``encoder.embed_tokens``."""
    from safetensors.torch import load_file, save_file
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    [name] = [name for name in tensors if name in ("shared.weight", "encoder.embed_tokens.weight")]
    for other in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        renamed = {(other if key == name else key): value for key, value in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})
        [component] = aoconvert.plan(tmp_path, "int8wo", output=tmp_path.parent / "out", device="cpu").components
        origins = {t.name: t.origin for t in component.tensors if t.embedding and t.action != "tied" and t.origin}
        assert ("model.safetensors", other) in origins.values(), other
