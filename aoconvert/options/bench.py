"""What ``bench`` can be told. A new option is a field here, and its line in ``BenchKwargs``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypedDict

from aoconvert.environment import check_device_names
from aoconvert.errors import UsageError
from aoconvert.options.fields import COUNT, COUNTS, PIXELS, SWITCH, Option, Pictured, SourceRevision
from aoconvert.options.hub import CacheDir, FromHub, LocalFilesOnly, Revision, Token


class BenchKwargs(TypedDict, total=False):
    """``BenchOptions`` as keyword arguments, for type checkers; a test holds the two equal."""

    source: str | None
    source_revision: str | None
    compile: bool
    offload: bool
    batch_size: int | Sequence[int]
    runs: int
    tokens: int
    steps: int
    size: str | None
    frames: int
    device: str
    trust_remote_code: bool
    revision: str | None
    token: str | None
    cache_dir: str | Path | None
    local_files_only: bool


@dataclass(frozen=True)
class BenchOptions(Pictured, FromHub):
    """What to measure; the help of each field says what it is.

    A ``source`` of ``None`` measures the result alone. A ``device`` of ``auto`` is the one that the layout is for where
    that is here, else the CPU. A ``size`` of ``None`` is the smallest that the pipeline takes.
    """

    source: Annotated[str | None, Option("Measure the original too: a folder or a repo id.")] = None
    source_revision: SourceRevision = None
    compile: Annotated[
        bool,
        Option("Measure with torch.compile too. Default: no.", SWITCH, opposite="--no-compile", recorded=2),
    ] = False
    offload: Annotated[
        bool,
        Option(
            "Measure the offload modes of diffusers too: model offload, sequential offload, VAE tiling.",
            SWITCH,
            recorded=2,
        ),
    ] = False
    batch_size: Annotated[
        tuple[int, ...],
        Option("Images, videos or texts that are processed together. Repeatable. Default: 1.", COUNTS, recorded=3),
    ] = ()
    runs: Annotated[int, Option("Runs that are timed, after warm-ups.", COUNT, show_default=True, recorded=3)] = 5
    tokens: Annotated[
        int,
        Option(
            "Tokens in each text, and tokens that a language model generates.", COUNT, show_default=True, recorded=3
        ),
    ] = 32
    steps: Annotated[
        int, Option("Denoising steps of a whole call of a pipeline.", COUNT, show_default=True, recorded=3)
    ] = 4
    size: Annotated[
        str | None,
        Option(
            "Size of images or videos. Default: the smallest that the pipeline accepts.",
            metavar="WIDTHxHEIGHT",
            recorded=3,
            pattern=PIXELS,
        ),
    ] = None
    frames: Annotated[int, Option("Frames of a video.", COUNT, show_default=True, recorded=3)] = 9
    device: Annotated[str, Option("Device to run on.", metavar="auto|cpu|cuda|cuda:N|xpu", show_default=True)] = "auto"
    trust_remote_code: Annotated[
        bool, Option("Run model code from the checkpoint and the source.", SWITCH, recorded=4)
    ] = False
    revision: Revision = None
    token: Token = field(default=None, repr=False)
    cache_dir: CacheDir = None
    local_files_only: LocalFilesOnly = False

    def __post_init__(self) -> None:
        check_device_names(self.device)
        if "," in self.device or self.device.endswith(":all"):
            raise UsageError(f"--device {self.device}: bench runs on one device", hint="e.g. cuda:0")
        counts = {name: (getattr(self, name),) for name in ("runs", "tokens", "steps", "frames")}
        for name, values in {**counts, "batch_size": self.batch_size}.items():
            for value in values:
                if value < 1:
                    raise UsageError(f"--{name.replace('_', '-')} {value} is not a positive number")
        self.check_size()

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Each batch size once, in the order given."""
        return tuple(dict.fromkeys(self.batch_size)) or (1,)
