"""The demo: a tiny CogVideoX pipeline with random weights, quantized, verified, and with its model card."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.environment import import_diffusers
from aoconvert.errors import PlanError, VerificationError
from aoconvert.humanize import first
from aoconvert.planning.output import refuse_output
from aoconvert.progress import Progress
from aoconvert.sources.folder import FolderSource

if TYPE_CHECKING:
    from aoconvert.checkpoint.report import Report
    from aoconvert.engine.results import QuantizeResult

_ANOTHER = "choose another folder"
_PROMPT = "a panda plays a guitar in a bamboo forest"


@dataclass(frozen=True)
class DemoResult:
    """What the demo did: the conversion, its verification, and the files of its model card."""

    source: Path
    result: QuantizeResult
    report: Report
    card: tuple[Path, ...]


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


def _check_folder(folder: Path, source: Path) -> None:
    """Refuse a folder of somebody else, without an import. What is hidden may be of a demo that was stopped."""
    if folder.exists() and not folder.is_dir():
        raise PlanError([f"{folder} is not a folder"], hint=_ANOTHER)
    held = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    if held and not (source / "model_index.json").is_file():
        raise PlanError([f"{folder} is not empty, and is not an earlier demo"], hint=_ANOTHER)
    refuse_output(FolderSource(source), folder / "out", overwrite=True)


def _place_pipeline(source: Path) -> None:
    """Put the pipeline at ``source``, whole; one that is there already must be the same in every byte.

    Raises:
        PlanError: it is another one, or has other files in it.
    """
    source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".aoconvert-demo-", dir=source.parent) as name:
        built = Path(name) / "source"
        build_pipeline(built)
        if not source.exists():
            built.rename(source)
        elif other := _differences(source, built):
            raise PlanError([f"{source} is not the pipeline that this demo builds: {first(other)}"], hint=_ANOTHER)


def _differences(one: Path, other: Path) -> list[str]:
    """Files that are not the same in two folders, by their paths in them."""
    files = [{path.relative_to(at): path for path in at.rglob("*") if not path.is_dir()} for at in (one, other)]
    return [
        path.as_posix()
        for path in sorted(files[0].keys() | files[1].keys())
        if not all(path in held and held[path].is_file() for held in files)
        or files[0][path].read_bytes() != files[1][path].read_bytes()
    ]


def run(folder: Path, scheme: str, progress: Progress) -> DemoResult:
    """Build the pipeline in ``folder/source``, quantize it into ``folder/out``, verify that and write its model card.

    Raises:
        UsageError: an unknown scheme.
        PlanError: the folder holds something else.
        VerificationError: the result is not what it should be.
    """
    from aoconvert import api, cards, schemes

    schemes.find(scheme)
    source, output = folder / "source", folder / "out"
    _check_folder(folder, source)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    _place_pipeline(source)
    result = api.quantize(source, scheme, progress=progress, output=output, overwrite=True, device="cpu")
    report = api.verify(output, progress=progress, example=True, source=str(source))
    if not report.ok:
        failed = report.failed[0]
        raise VerificationError(f"the result did not pass {failed.name}: {failed.detail}", hint="please report this")
    return DemoResult(source, result, report, cards.write(output, cards.render(output, cards.CardOptions())))
