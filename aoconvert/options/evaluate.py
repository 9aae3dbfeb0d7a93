"""What ``eval`` can be told. A new option is a field here, and its line in ``EvaluateKwargs``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypedDict

from aoconvert.environment import check_device_names
from aoconvert.errors import UsageError
from aoconvert.options.fields import (
    COUNT,
    FILE,
    FILES,
    FRACTION,
    NUMBER,
    PIXELS,
    SWITCH,
    Option,
    Pictured,
    SourceRevision,
    TrustRemoteCode,
)
from aoconvert.options.hub import CacheDir, FromHub, LocalFilesOnly, Revision, Token


class EvaluateKwargs(TypedDict, total=False):
    """``EvaluateOptions`` as keyword arguments, for type checkers; a test holds the two equal."""

    source: str | None
    source_revision: str | None
    text: str | Path | Sequence[str | Path]
    prompts: str | Path | None
    samples: int
    tokens: int
    seed: int
    seeds: int
    steps: int
    size: str | None
    noise_floor: bool
    layers: bool
    max_kl: float | None
    min_agreement: float | None
    max_perplexity_ratio: float | None
    min_cosine: float | None
    min_psnr: float | None
    max_lpips: float | None
    device: str
    trust_remote_code: bool
    revision: str | None
    token: str | None
    cache_dir: str | Path | None
    local_files_only: bool


@dataclass(frozen=True)
class EvaluateOptions(Pictured, FromHub):
    """What to compare on, and what must be reached; the help of each field says what it is.

    A ``source`` of ``None`` is the repo that the manifest names. ``device`` is one, or several after commas, on which
    the libraries then distribute the layers; ``auto`` is the one that the layout is for, else the CPU.
    """

    source: Annotated[
        str | None,
        Option("The original to compare with: a folder or a repo id. Default: the repo that the manifest names."),
    ] = None
    source_revision: SourceRevision = None
    text: Annotated[
        tuple[Path, ...],
        Option(
            "Text to compare on, UTF-8. Repeatable. Default: text that the original generates; for encoders, random "
            "tokens.",
            FILES,
            metavar="FILE",
            recorded=1,
        ),
    ] = ()
    prompts: Annotated[
        Path | None,
        Option(
            "Prompts for a pipeline, UTF-8, one on each line. Default: two of aoconvert's own.",
            FILE,
            metavar="FILE",
            recorded=1,
        ),
    ] = None
    samples: Annotated[
        int, Option("How many windows of text, or other inputs, to compare on.", COUNT, show_default=True, recorded=2)
    ] = 8
    tokens: Annotated[int, Option("Tokens in each window.", COUNT, show_default=True, recorded=2)] = 256
    seed: Annotated[int, Option("Seed of what is generated or drawn.", COUNT, show_default=True, recorded=2)] = 1
    seeds: Annotated[
        int, Option("Pipelines: seeds for each prompt, from --seed on.", COUNT, show_default=True, recorded=2)
    ] = 1
    steps: Annotated[int, Option("Pipelines: denoising steps.", COUNT, show_default=True, recorded=2)] = 4
    size: Annotated[
        str | None,
        Option(
            "Pipelines: size of images or videos. Default: the smallest that the pipeline accepts.",
            metavar="WIDTHxHEIGHT",
            recorded=2,
            pattern=PIXELS,
        ),
    ] = None
    noise_floor: Annotated[
        bool,
        Option("Skip the figures for noise like bfloat16 rounding.", SWITCH, ("--no-noise-floor",), recorded=3),
    ] = True
    layers: Annotated[bool, Option("Skip the output error of each layer.", SWITCH, ("--no-layers",), recorded=3)] = True
    max_kl: Annotated[
        float | None, Option("Fail if the mean KL divergence, in nats, is larger.", NUMBER, recorded=4)
    ] = None
    min_agreement: Annotated[
        float | None,
        Option("Fail if the most likely token agrees for a smaller fraction of tokens.", FRACTION, recorded=4),
    ] = None
    max_perplexity_ratio: Annotated[
        float | None,
        Option("Fail if the perplexity, divided by the original's, is larger.", NUMBER, recorded=4),
    ] = None
    min_cosine: Annotated[
        float | None, Option("Fail if the mean cosine of the outputs is smaller.", NUMBER, recorded=4)
    ] = None
    min_psnr: Annotated[
        float | None, Option("Fail if the mean PSNR of the pictures, in dB, is smaller.", NUMBER, recorded=4)
    ] = None
    max_lpips: Annotated[
        float | None, Option("Fail if the mean LPIPS of the pictures is larger.", NUMBER, recorded=4)
    ] = None
    device: Annotated[
        str,
        Option(
            "Device to run on; cuda:0,cuda:1 or cuda:all use several.",
            metavar="auto|cpu|cuda|cuda:N|xpu",
            show_default=True,
        ),
    ] = "auto"
    trust_remote_code: TrustRemoteCode = False
    revision: Revision = None
    token: Token = field(default=None, repr=False)
    cache_dir: CacheDir = None
    local_files_only: LocalFilesOnly = False

    def __post_init__(self) -> None:
        check_device_names(self.device)
        for name in ("samples", "tokens", "seed", "seeds", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1")
        if self.tokens < 2:
            raise UsageError("--tokens must be at least 2: a token is predicted from those before it")
        self.check_size()
