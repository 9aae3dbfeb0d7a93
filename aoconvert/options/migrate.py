"""What ``migrate`` can be told. A new option is a field here, and its line in ``MigrateKwargs``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from aoconvert.options.fields import FOLDER, SWITCH, Option, choice
from aoconvert.options.hub import CacheDir, FromHub, LocalFilesOnly, Revision, Token

PackedOn = Literal["avx512", "avx2", "generic"]


class MigrateKwargs(TypedDict, total=False):
    """``MigrateOptions`` as keyword arguments, for type checkers; a test holds the two equal."""

    then: str | None
    packed_on: PackedOn | None
    exact: bool
    output: str | Path
    overwrite: bool
    resume: bool
    revision: str | None
    token: str | None
    cache_dir: str | Path | None
    local_files_only: bool


@dataclass(frozen=True)
class MigrateOptions(FromHub):
    """What to do with an old checkpoint; the help of each field says what it is.

    A ``then`` of ``None`` leaves the values as they are, in the dtype that they have.
    """

    then: Annotated[
        str | None,
        Option(
            "Scheme for weights that no tensor class of today can hold. Default: dequantize them exactly.",
            metavar="SCHEME",
            recorded=1,
        ),
    ] = None
    packed_on: Annotated[
        PackedOn | None,
        Option(
            "Instruction set of the CPU that packed the int4 weights, which old files do not record.",
            choice("avx512", "avx2", "generic"),
            recorded=2,
        ),
    ] = None
    exact: Annotated[
        bool,
        Option("Dequantize what a tensor class of today would round: Quanto's int4 and int2.", SWITCH, recorded=3),
    ] = False
    output: Annotated[Path, Option("Output folder.", FOLDER, ("-o", "--output"), show_default=True)] = Path("out")
    overwrite: Annotated[
        bool, Option("Replace an earlier result of aoconvert in the output folder, never anything else.", SWITCH)
    ] = False
    resume: Annotated[bool, Option("Start over instead of resuming a stopped run.", SWITCH, ("--no-resume",))] = True
    revision: Revision = None
    token: Token = field(default=None, repr=False)
    cache_dir: CacheDir = None
    local_files_only: LocalFilesOnly = False
