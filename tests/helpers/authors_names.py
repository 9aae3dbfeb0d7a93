"""Tensors of diffusers models under the names of the models' authors, as published in single files.

The inverse of ``diffusers.loaders.single_file_utils``; a test opens what is made here with ``from_single_file``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from helpers import tiny

State = Mapping[str, torch.Tensor]


def _swap(weight: torch.Tensor) -> torch.Tensor:
    scale, shift = weight.chunk(2)
    return torch.cat([shift, scale])


def _renamed(state: State, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in state.items():
        new = name
        for pattern, other in names.items():
            new = re.sub(pattern, other, new)
        made[new] = tensor
    return made


def _join(state: dict[str, torch.Tensor], parts: tuple[str, ...], whole: str) -> None:
    """Put the layers ``parts`` of each block into one."""
    for name in [name for name in state if f".{parts[0]}." in name]:
        names = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        state[name.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([state.pop(part) for part in names])


def wan(state: State) -> dict[str, torch.Tensor]:
    names = {
        r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
        r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
        r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
        r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
        r"^condition_embedder\.time_proj": "time_projection.1",
        r"^scale_shift_table": "head.modulation",
        r"^proj_out": "head.head",
        r"scale_shift_table": "modulation",
        r"attn2": "cross_attn",
        r"attn1": "self_attn",
        r"\.to_out\.0\.": ".o.",
        r"\.to_([qkv])\.": r".\1.",
        r"ffn\.net\.0\.proj": "ffn.0",
        r"ffn\.net\.2": "ffn.2",
        r"norm2": "norm_",
        r"norm3": "norm2",
        r"norm_\.": "norm3.",
    }
    return _renamed(state, names)


def sd3(state: State) -> dict[str, torch.Tensor]:
    names = {
        r"^pos_embed\.pos_embed": "pos_embed",
        r"^pos_embed\.proj": "x_embedder.proj",
        r"^time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
        r"^time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
        r"^time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
        r"^time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
        r"^proj_out": "final_layer.linear",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        r"^transformer_blocks": "joint_blocks",
        r"attn\.to_out\.0": "x_block.attn.proj",
        r"attn\.to_add_out": "context_block.attn.proj",
        r"norm1\.linear": "x_block.adaLN_modulation.1",
        r"norm1_context\.linear": "context_block.adaLN_modulation.1",
        r"ff\.net\.0\.proj": "x_block.mlp.fc1",
        r"ff\.net\.2": "x_block.mlp.fc2",
        r"ff_context\.net\.0\.proj": "context_block.mlp.fc1",
        r"ff_context\.net\.2": "context_block.mlp.fc2",
    }
    made = _renamed(state, names)
    _join(made, ("attn.to_q", "attn.to_k", "attn.to_v"), "x_block.attn.qkv")
    _join(made, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "context_block.attn.qkv")
    last = max(int(name.split(".")[1]) for name in made if name.startswith("joint_blocks."))
    for kind in ("weight", "bias"):
        for layer in ("final_layer", f"joint_blocks.{last}.context_block"):
            name = f"{layer}.adaLN_modulation.1.{kind}"
            made[name] = _swap(made[name])
    return {f"model.diffusion_model.{name}": tensor for name, tensor in made.items()}


def flux(state: State) -> dict[str, torch.Tensor]:
    names = {
        r"^time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
        r"^time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
        r"^time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
        r"^time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
        r"^time_text_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
        r"^time_text_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
        r"^context_embedder": "txt_in",
        r"^x_embedder": "img_in",
        r"^proj_out": "final_layer.linear",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        r"^single_transformer_blocks": "single_blocks",
        r"^transformer_blocks": "double_blocks",
        r"(single.*)norm\.linear": r"\1modulation.lin",
        r"(single.*)proj_out": r"\1linear2",
        r"(single.*)attn\.norm_q\.weight": r"\1norm.query_norm.scale",
        r"(single.*)attn\.norm_k\.weight": r"\1norm.key_norm.scale",
        r"norm1\.linear": "img_mod.lin",
        r"norm1_context\.linear": "txt_mod.lin",
        r"attn\.norm_q\.weight": "img_attn.norm.query_norm.scale",
        r"attn\.norm_k\.weight": "img_attn.norm.key_norm.scale",
        r"attn\.norm_added_q\.weight": "txt_attn.norm.query_norm.scale",
        r"attn\.norm_added_k\.weight": "txt_attn.norm.key_norm.scale",
        r"ff\.net\.0\.proj": "img_mlp.0",
        r"ff\.net\.2": "img_mlp.2",
        r"ff_context\.net\.0\.proj": "txt_mlp.0",
        r"ff_context\.net\.2": "txt_mlp.2",
        r"attn\.to_out\.0": "img_attn.proj",
        r"attn\.to_add_out": "txt_attn.proj",
        r"(single.*)attn\.to_": r"\1only_",
    }
    made = _renamed(state, names)
    _join(made, ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv")
    _join(made, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv")
    _join(made, ("only_q", "only_k", "only_v", "proj_mlp"), "linear1")
    for kind in ("weight", "bias"):
        name = f"final_layer.adaLN_modulation.1.{kind}"
        made[name] = _swap(made[name])
    return made


def ltx(state: State) -> dict[str, torch.Tensor]:
    names = {r"^proj_in": "patchify_proj", r"^time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
    return {f"model.diffusion_model.{name}": tensor for name, tensor in _renamed(state, names).items()}


def sdxl(state: State) -> dict[str, torch.Tensor]:
    """Of a UNet with a layer in each of two blocks, attention in the second one."""
    names = {
        r"^time_embedding\.linear_1": "time_embed.0",
        r"^time_embedding\.linear_2": "time_embed.2",
        r"^add_embedding\.linear_1": "label_emb.0.0",
        r"^add_embedding\.linear_2": "label_emb.0.2",
        r"^conv_in": "input_blocks.0.0",
        r"^conv_norm_out": "out.0",
        r"^conv_out": "out.2",
        r"^down_blocks\.0\.resnets\.0": "input_blocks.1.0",
        r"^down_blocks\.0\.downsamplers\.0\.conv": "input_blocks.2.0.op",
        r"^down_blocks\.1\.resnets\.0": "input_blocks.3.0",
        r"^down_blocks\.1\.attentions\.0": "input_blocks.3.1",
        r"^mid_block\.resnets\.0": "middle_block.0",
        r"^mid_block\.attentions\.0": "middle_block.1",
        r"^mid_block\.resnets\.1": "middle_block.2",
        r"^up_blocks\.0\.resnets\.(\d)": r"output_blocks.\1.0",
        r"^up_blocks\.0\.attentions\.(\d)": r"output_blocks.\1.1",
        r"^up_blocks\.0\.upsamplers\.0\.conv": "output_blocks.1.2.conv",
        r"^up_blocks\.1\.resnets\.0": "output_blocks.2.0",
        r"^up_blocks\.1\.resnets\.1": "output_blocks.3.0",
        r"(blocks\.\d\.0|block\.[02])\.norm1": r"\1.in_layers.0",
        r"(blocks\.\d\.0|block\.[02])\.conv1": r"\1.in_layers.2",
        r"(blocks\.\d\.0|block\.[02])\.norm2": r"\1.out_layers.0",
        r"(blocks\.\d\.0|block\.[02])\.conv2": r"\1.out_layers.3",
        r"time_emb_proj": "emb_layers.1",
        r"conv_shortcut": "skip_connection",
    }
    return {f"model.diffusion_model.{name}": tensor for name, tensor in _renamed(state, names).items()}


def sdxl_unet() -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=32,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


def ltx_transformer() -> Any:
    import diffusers

    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=32,
    )


def flux_transformer() -> Any:
    """As wide as Flux: diffusers' conversion takes only that width."""
    import diffusers

    return diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True
    )


MODELS: Mapping[str, tuple[Callable[[], Any], Callable[[State], dict[str, torch.Tensor]]]] = {
    "wan": (tiny.wan_transformer, wan),
    "sd3": (tiny.sd3_transformer, sd3),
    "sdxl": (sdxl_unet, sdxl),
    "ltx": (ltx_transformer, ltx),
    "flux": (flux_transformer, flux),
}
"""Name → builds the model, and names its tensors as its authors do."""
