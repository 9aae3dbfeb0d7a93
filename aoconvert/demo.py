"""The demo: a tiny CogVideoX pipeline with random weights, quantized, and opened again in a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.environment import import_diffusers
from aoconvert.errors import PlanError, VerificationError
from aoconvert.manifest import MANIFEST_NAME
from aoconvert.progress import Progress

if TYPE_CHECKING:
    from aoconvert.engine.run import QuantizeResult

_PROMPT = "a panda plays a guitar in a bamboo forest"

# Only what a user would write, run where nothing of aoconvert is imported.
_RELOAD = """\
import json, sys
import torch, torchao
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
pipe.set_progress_bar_config(disable=True)
latents = pipe({prompt!r}, height=64, width=64, num_frames=9, num_inference_steps=1, max_sequence_length=16,
               generator=torch.Generator().manual_seed(0), output_type="latent").frames
weights = [type(module.weight).__name__ for module in pipe.transformer.modules() if isinstance(module, torch.nn.Linear)]
print(json.dumps({{"class": type(pipe).__name__, "shape": list(latents.shape), "finite": bool(latents.isfinite().all()),
                  "quantized": sum(name != "Parameter" for name in weights), "linear": len(weights)}}))
"""


@dataclass(frozen=True)
class DemoResult:
    """What the demo did: the conversion, and what a fresh process saw."""

    source: Path
    result: QuantizeResult
    reloaded: dict[str, Any]


def build_pipeline(folder: Path) -> None:
    """Write a CogVideoX pipeline of real classes with small random weights (always the same) to ``folder``."""
    import torch

    import_diffusers()
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=8,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            time_embed_dim=32,
            text_embed_dim=64,
            num_layers=4,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        )
        vae = AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
        config = T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=256)
        text_encoder = T5EncoderModel(config)
    words = [(word, -3.0) for word in dict.fromkeys(f"▁{word}" for word in _PROMPT.split())]
    letters = [(chr(code), -9.0) for code in range(ord("a"), ord("z") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0, model_max_length=16)
    CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.bfloat16(),
        vae=vae.bfloat16(),
        transformer=transformer.bfloat16(),
        scheduler=CogVideoXDDIMScheduler(),
    ).save_pretrained(folder)


def run(folder: Path, scheme: str, progress: Progress) -> DemoResult:
    """Build the pipeline in ``folder/source``, quantize it into ``folder/out`` and open that in a fresh process.

    Raises:
        PlanError: the folder holds something else.
        VerificationError: the result could not be opened, or gave no finite output.
    """
    from aoconvert.api import make_options, quantize_options

    source, output = folder / "source", folder / "out"
    if folder.exists() and not folder.is_dir():
        raise PlanError([f"{folder} is not a folder"], hint="name another folder")
    if folder.exists() and any(folder.iterdir()):
        if not (output / MANIFEST_NAME).is_file() or not (source / "model_index.json").is_file():
            raise PlanError([f"{folder} is not empty and holds no earlier demo"], hint="name another folder")
        shutil.rmtree(source)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    build_pipeline(source)
    options = make_options(scheme, {"output": output, "overwrite": True, "device": "cpu"})
    return DemoResult(source, quantize_options(source, options, progress=progress), reload(output))


def reload(output: Path) -> dict[str, Any]:
    """Open the pipeline in a fresh interpreter with plain diffusers code, and take one denoising step.

    Raises:
        VerificationError: that failed, or its output is not finite.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RELOAD.format(prompt=_PROMPT), str(output)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise VerificationError(f"the result did not open in a fresh process: {last}", hint="please report this")
    seen: dict[str, Any] = json.loads(lines[-1])
    if not seen["finite"] or not seen["quantized"]:
        raise VerificationError("the reloaded pipeline gave no finite output", hint="please report this")
    return seen
