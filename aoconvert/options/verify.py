"""What ``verify`` can be told. A new option is a field here, and its line in ``VerifyKwargs``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from aoconvert.environment import check_device_names
from aoconvert.options.fields import LORAS, SWITCH, Option, SourceRevision, TrustRemoteCode, choice
from aoconvert.options.hub import CacheDir, FromHub, LocalFilesOnly, Revision, Token

Choice = Literal["auto", "from-pretrained", "assign"]


class VerifyKwargs(TypedDict, total=False):
    """``VerifyOptions`` as keyword arguments, for type checkers; a test holds the two equal."""

    source: str | None
    source_revision: str | None
    lora: str | Sequence[str]
    strategy: Choice
    device: str
    reload: bool
    forward: bool
    example: bool
    require_device: bool
    trust_remote_code: bool
    revision: str | None
    token: str | None
    cache_dir: str | Path | None
    local_files_only: bool


@dataclass(frozen=True)
class VerifyOptions(FromHub):
    """What to check; the help of each field says what it is.

    ``source`` is a folder, a weights file or a repo, of which the commit that was quantized is taken where
    ``source_revision`` names no other. A ``strategy`` of ``auto`` takes ``assign`` where ``from_pretrained`` fails, a
    ``device`` of ``auto`` is the layout's where that is here, else the CPU.
    """

    source: Annotated[
        str | None,
        Option("Let the library open the original too (folder, weights file or repo id), and compare everything."),
    ] = None
    source_revision: SourceRevision = None
    lora: Annotated[
        tuple[str, ...],
        Option(
            "File of a LoRA that was added, to compare with --source; those of the Hub are fetched. Repeatable.",
            LORAS,
            metavar="FILE",
        ),
    ] = ()
    strategy: Annotated[
        Choice,
        Option(
            "How to load it; auto falls back to assign if from_pretrained fails.",
            choice("auto", "from-pretrained", "assign"),
            show_default=True,
        ),
    ] = "auto"
    device: Annotated[
        str, Option("Device to open the model on.", metavar="auto|cpu|cuda|cuda:N|xpu", show_default=True)
    ] = "auto"
    reload: Annotated[
        bool,
        Option("Do not open the model: check files, pickles, versions and torch.load only.", SWITCH, ("--no-reload",)),
    ] = True
    forward: Annotated[bool, Option("Skip the forward pass.", SWITCH, ("--no-forward",))] = True
    example: Annotated[bool, Option("Also run the model card's example, at the smallest sizes.", SWITCH)] = False
    require_device: Annotated[
        bool, Option("Fail if the device that the layout is for is not available here.", SWITCH)
    ] = False
    trust_remote_code: TrustRemoteCode = False
    revision: Revision = None
    token: Token = field(default=None, repr=False)
    cache_dir: CacheDir = None
    local_files_only: LocalFilesOnly = False

    def __post_init__(self) -> None:
        check_device_names(self.device)
