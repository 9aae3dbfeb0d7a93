"""Tiny pipelines with parts whose classes are the pipeline's own, as diffusers itself saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from helpers import tiny
from helpers.tiny import clip_text, clip_tokenizer, diffusers, image_vae, t5_encoder, t5_tokenizer, transformers

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 32,
}
_BLOCKS = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def _unet(**changes: Any) -> Any:
    values = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, **_BLOCKS, **changes}
    return diffusers.UNet2DConditionModel(**values)


def _clip_config() -> Any:
    return transformers.CLIPConfig(vision_config=_VISION, projection_dim=32)


def stable_diffusion(folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    checker = StableDiffusionSafetyChecker(_clip_config())
    with torch.no_grad():  # it makes these all ones
        for name in ("concept_embeds", "special_care_embeds", "concept_embeds_weights"):
            getattr(checker, name).normal_()
    diffusers.StableDiffusionPipeline(
        vae=image_vae().bfloat16(),
        text_encoder=clip_text("CLIPTextModel").bfloat16(),
        tokenizer=clip_tokenizer(),
        unet=_unet().bfloat16(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=checker,
        feature_extractor=transformers.CLIPImageProcessor(size=32, crop_size=32),
    ).save_pretrained(folder)


def two_controlnets(folder: Path) -> None:
    """A part that is a list of models, in folders of their own."""
    unet = _unet().bfloat16()
    nets = [diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)) for _ in range(2)]
    for parameter in nets[1].parameters():
        parameter.data.normal_()
    diffusers.StableDiffusionControlNetPipeline(
        vae=image_vae().bfloat16(),
        text_encoder=clip_text("CLIPTextModel").bfloat16(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        controlnet=diffusers.MultiControlNetModel(nets).bfloat16(),
        scheduler=diffusers.UniPCMultistepScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def deepfloyd(folder: Path) -> None:
    from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker

    watermarker = IFWatermarker()
    watermarker.watermark_image.uniform_(0, 255)
    diffusers.IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder().bfloat16(),
        unet=_unet(in_channels=3, out_channels=6, encoder_hid_dim=32).bfloat16(),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=IFSafetyChecker(_clip_config()),
        feature_extractor=transformers.CLIPImageProcessor(size=32, crop_size=32),
        watermarker=watermarker,
    ).save_pretrained(folder)


def stable_audio(folder: Path) -> None:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        cross_attention_input_dim=32,
        time_proj_dim=8,
        global_states_input_dim=64,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=8,
    )
    diffusers.StableAudioPipeline(
        vae=vae,
        text_encoder=t5_encoder().bfloat16(),
        projection_model=diffusers.StableAudioProjectionModel(32, 32, 0, 512),
        tokenizer=t5_tokenizer(),
        transformer=transformer.bfloat16(),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
    ).save_pretrained(folder)


def kandinsky(folder: Path) -> None:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        transformerDimSize=32,
        imageDimSize=32,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    movq = diffusers.VQModel(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    diffusers.KandinskyPipeline(
        text_encoder=MultilingualCLIP(config).bfloat16(),
        tokenizer=transformers.XLMRobertaTokenizer(vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]),
        unet=_unet().bfloat16(),
        scheduler=diffusers.DDIMScheduler(),
        movq=movq,
    ).save_pretrained(folder)


def ltx2_connectors() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    return LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )


def ltx2(folder: Path) -> None:
    """Its VAEs and text encoder are large whatever their configs, and are left out: null in model_index.json."""
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vocoder = LTX2Vocoder(
        in_channels=8,
        hidden_channels=16,
        upsample_kernel_sizes=[4],
        upsample_factors=[2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
    )
    diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        audio_vae=None,
        text_encoder=None,
        tokenizer=None,
        connectors=ltx2_connectors().bfloat16(),
        transformer=transformer.bfloat16(),
        vocoder=vocoder,
    ).save_pretrained(folder)


def audioldm2_unet() -> Any:
    """A denoiser whose class is its pipeline's own."""
    from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel

    return AudioLDM2UNet2DConditionModel(**{**_BLOCKS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32})


def own_denoiser(folder: Path) -> None:
    """AudioLDM 2 with nothing but its denoiser, projection and scheduler."""
    from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel

    parts = ("vae", "text_encoder", "text_encoder_2", "language_model", "tokenizer", "tokenizer_2", "feature_extractor")
    diffusers.AudioLDM2Pipeline(
        **dict.fromkeys((*parts, "vocoder")),
        projection_model=AudioLDM2ProjectionModel(32, 32, 32),
        unet=audioldm2_unet().bfloat16(),
        scheduler=diffusers.DDIMScheduler(),
    ).save_pretrained(folder)


# name → how it is built, and its parts with weights that have classes of their own
PIPELINES: Mapping[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "stable-diffusion": (stable_diffusion, ("safety_checker",)),
    "controlnets": (two_controlnets, ("controlnet", "controlnet_1")),
    "deepfloyd": (deepfloyd, ("safety_checker", "watermarker")),
    "stable-audio": (stable_audio, ("projection_model",)),
    "kandinsky": (kandinsky, ("text_encoder",)),
    "ltx2": (ltx2, ("connectors", "vocoder")),
    "audioldm2": (own_denoiser, ("projection_model", "unet")),
}


def build(name: str, folder: Path) -> None:
    """Random weights, in every part."""
    with tiny.torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        PIPELINES[name][0](folder)
