"""Whole pipelines in one file, under the names of their authors, as Stable Diffusion 3 and XL are published."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from helpers.authors_names import MODELS, State


def _vae(state: State) -> dict[str, torch.Tensor]:
    """Of two blocks on each side."""
    made = {}
    for name, tensor in state.items():
        new = name
        for pattern, other in {
            r"conv_norm_out": "norm_out",
            r"down_blocks\.(\d)\.resnets": r"down.\1.block",
            r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
            r"up_blocks\.0": "up.1",
            r"up_blocks\.1": "up.0",
            r"(up\.\d)\.resnets": r"\1.block",
            r"(up\.\d)\.upsamplers\.0": r"\1.upsample",
            r"mid_block\.resnets\.0": "mid.block_1",
            r"mid_block\.resnets\.1": "mid.block_2",
            r"mid_block\.attentions\.0": "mid.attn_1",
            r"group_norm": "norm",
            r"to_([qkv])\.": r"\1.",
            r"to_out\.0": "proj_out",
            r"conv_shortcut": "nin_shortcut",
        }.items():
            new = re.sub(pattern, other, new)
        matrix = "attn_1" in new and tensor.dim() == 2
        made[f"first_stage_model.{new}"] = tensor[:, :, None, None] if matrix else tensor
    return made


def _open_clip(state: State, prefix: str) -> dict[str, torch.Tensor]:
    names = {
        r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
        r"^text_model\.embeddings\.token_embedding": "token_embedding",
        r"^text_model\.final_layer_norm": "ln_final",
        r"^text_model\.encoder\.layers": "transformer.resblocks",
        r"layer_norm": "ln_",
        r"\.self_attn": ".attn",
        r"fc1": "c_fc",
        r"fc2": "c_proj",
    }
    made: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        new = name
        for pattern, other in names.items():
            new = re.sub(pattern, other, new)
        made[prefix + new] = tensor
    for name in [name for name in made if ".attn.q_proj." in name]:
        parts = [made.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        made[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    made[f"{prefix}text_projection"] = made.pop(f"{prefix}text_projection.weight").T
    made[f"{prefix}logit_scale"] = torch.ones(())
    return made


def _with(prefix: str) -> Callable[[State], dict[str, torch.Tensor]]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def _without_projection(state: State) -> dict[str, torch.Tensor]:
    prefix = "text_encoders.clip_l.transformer."
    return {prefix + name: tensor for name, tensor in state.items() if not name.startswith("text_projection")}


def sd3(folder: Path) -> None:
    import diffusers

    first = tiny.clip_text("CLIPTextModelWithProjection")
    torch.nn.init.eye_(first.text_projection.weight)  # the file has none, and diffusers takes this one
    diffusers.StableDiffusion3Pipeline(
        transformer=tiny.sd3_transformer().bfloat16(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.image_vae().bfloat16(),
        text_encoder=first.bfloat16(),
        tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=tiny.clip_text("CLIPTextModelWithProjection", width=64).bfloat16(),
        tokenizer_2=tiny.clip_tokenizer(),
        text_encoder_3=tiny.t5_encoder(width=64).bfloat16(),
        tokenizer_3=tiny.t5_tokenizer(),
    ).save_pretrained(folder)


def sdxl(folder: Path) -> None:
    import diffusers

    diffusers.StableDiffusionXLPipeline(
        unet=MODELS["sdxl"][0]().half(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        vae=tiny.image_vae().half(),
        text_encoder=tiny.clip_text("CLIPTextModel").half(),
        tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=tiny.clip_text("CLIPTextModelWithProjection", width=64).half(),
        tokenizer_2=tiny.clip_tokenizer(),
    ).save_pretrained(folder)


def sd1(folder: Path) -> None:
    """With a safety checker, which no single file holds."""
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    half: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "projection_dim": 32,
    }
    vision = {**half, "image_size": 32, "patch_size": 8}
    clip = transformers.CLIPConfig(text_config=half, vision_config=vision, projection_dim=32)
    diffusers.StableDiffusionPipeline(
        unet=sd1_unet().half(),
        scheduler=diffusers.DDIMScheduler(),
        vae=tiny.image_vae().half(),
        text_encoder=tiny.clip_text("CLIPTextModel").half(),
        tokenizer=tiny.clip_tokenizer(),
        safety_checker=StableDiffusionSafetyChecker(clip),
        feature_extractor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    ).save_pretrained(folder)


def sd1_unet() -> Any:
    import diffusers

    unet = MODELS["sdxl"][0]()
    left = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    return diffusers.UNet2DConditionModel.from_config({k: v for k, v in unet.config.items() if k not in left})


Rename = Callable[[State], dict[str, torch.Tensor]]
BUNDLES: Mapping[str, tuple[Callable[[Path], None], Mapping[str, Rename]]] = {
    "sd3": (
        sd3,
        {
            "transformer": MODELS["sd3"][1],
            "vae": _vae,
            "text_encoder": _without_projection,
            "text_encoder_2": _with("text_encoders.clip_g.transformer."),
            "text_encoder_3": _with("text_encoders.t5xxl.transformer."),
        },
    ),
    "sdxl": (
        sdxl,
        {
            "unet": MODELS["sdxl"][1],
            "vae": _vae,
            "text_encoder": _with("conditioner.embedders.0.transformer."),
            "text_encoder_2": lambda state: _open_clip(state, "conditioner.embedders.1.model."),
        },
    ),
    "sd1": (
        sd1,
        {"unet": MODELS["sdxl"][1], "vae": _vae, "text_encoder": _with("cond_stage_model.transformer.")},
    ),
}
"""Name → builds the pipeline's folder; part → names its tensors as its authors do."""


def _name_as_on_the_hub(path: Path) -> None:
    """The latest transformers saves a CLIPTextModel without the prefix that all its checkpoints have."""
    state = load_file(path)
    if "embeddings.token_embedding.weight" in state:
        save_file({f"text_model.{name}": tensor for name, tensor in state.items()}, path, {"format": "pt"})


def make_bundle(folder: Path, name: str, leave: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """The single file, and the folder of the pipeline; parts that are to ``leave`` are not in the file."""
    build, renames = BUNDLES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build(folder / "pipeline")
    state: dict[str, torch.Tensor] = {}
    for part, rename in renames.items():
        [path] = (folder / "pipeline" / part).glob("*.safetensors")
        if part.startswith("text_encoder"):
            _name_as_on_the_hub(path)
        if part not in leave:
            state |= rename(load_file(path))
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, folder / "all.safetensors")
    return folder / "all.safetensors", folder / "pipeline"
