"""What ``quantize`` and ``plan`` can be told. A new option is a field here, and its line in ``QuantizeKwargs``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from aoconvert.environment import check_device_names
from aoconvert.errors import UsageError
from aoconvert.options.fields import (
    COMPONENTS,
    COUNT,
    FILE,
    FOLDER,
    FRACTION,
    LORAS,
    NAMES,
    NUMBER,
    PATTERNS,
    REFERENCE,
    SETTINGS,
    SIZE,
    SWITCH,
    Option,
    choice,
    read_values,
)
from aoconvert.options.hub import CacheDir, FromHub, LocalFilesOnly, Revision, Token

AUTO = "auto"
LAYOUT_DEVICES = ("cpu", "cuda", "xpu")
FORMATS = ("bin", "safetensors")
DTYPES = ("bfloat16", "float16", "float32", "auto")
DEFAULT_DTYPE = "bfloat16"

_MOST_BYTES = 10**24  # no goal is above it: floats can count it


class QuantizeKwargs(TypedDict, total=False):
    """``QuantizeOptions`` as keyword arguments, in the types that people have at hand.

    Type checkers cannot read these off the fields, so they stand here again; a test holds the two equal.
    """

    group_size: int | None
    settings: Mapping[str, str]
    recipe: str | Path | None
    candidates: str | Sequence[str]
    min_sqnr: float | None
    target_bits: float | None
    target_size: int | str | None
    sensitivity: str | Path | None
    skip: str | Sequence[str]
    components: str | Sequence[str] | Mapping[str, str | None]
    component_only: bool
    keep_original_files: bool
    include_embeddings: bool
    untie: bool
    allow_missing: str | Sequence[str]
    drop_unknown: bool
    default_skips: bool
    fuse_qkv: bool
    carry: bool
    dtype: str | None
    device: str
    layout_device: str | None
    max_shard_size: int | str | None
    format: str
    min_quantized: float
    output: str | Path
    overwrite: bool
    resume: bool
    revision: str | None
    lora: str | Sequence[str]
    config: str | Path | None
    subfolder: str | None
    variant: str | None
    token: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class QuantizeOptions(FromHub):
    """The options of ``quantize`` and ``plan``; each field's help says what it does.

    ``scheme`` is ``None`` where the recipe, or each component, says it. A ``dtype`` of ``None`` is bfloat16, or the
    source's for a model whose class cannot run in bfloat16; a ``max_shard_size`` of ``None`` is the library's default.
    """

    scheme: Annotated[
        str | None,
        Option(
            "Scheme to quantize to (see 'aoconvert schemes'); auto chooses one for each tensor.",
            metavar="NAME",
            recorded=1,
        ),
    ]
    group_size: Annotated[
        int | None, Option("Number of values that share a scale, for schemes with groups.", COUNT, recorded=2)
    ] = None
    settings: Annotated[
        Mapping[str, str],
        Option("Set a field of the torchao config. Repeatable.", SETTINGS, ("--set",), metavar="KEY=VALUE", recorded=2),
    ] = field(default_factory=dict)
    recipe: Annotated[
        Path | None,
        Option(
            "Rules that choose a scheme for each tensor: a TOML file, or the config.json of an earlier result.",
            FILE,
            metavar="FILE",
            recorded=1,
        ),
    ] = None
    candidates: Annotated[
        tuple[str, ...],
        Option(
            "Schemes that auto chooses from. Default: those that the device of --layout-device can run.",
            NAMES,
            metavar="NAME,NAME",
            recorded=1,
        ),
    ] = ()
    min_sqnr: Annotated[
        float | None,
        Option(
            "With auto: for each tensor, use the smallest scheme that reaches this SQNR.",
            NUMBER,
            metavar="DB",
            recorded=4,
        ),
    ] = None
    target_bits: Annotated[
        float | None,
        Option("With auto: use at most this many bits per weight.", NUMBER, metavar="B", recorded=4),
    ] = None
    target_size: Annotated[
        int | None,
        Option("With auto: write at most this many bytes, e.g. 8GB.", SIZE, metavar="SIZE", recorded=4),
    ] = None
    sensitivity: Annotated[
        Path | None,
        Option(
            "With auto: report of 'aoconvert eval', by which a weight's error counts for what the model then gives.",
            FILE,
            metavar="FILE",
            recorded=4,
        ),
    ] = None
    skip: Annotated[
        tuple[str, ...],
        Option(
            "Leave matching tensors unquantized: a tensor or module name, or re:REGEX (full match). Repeatable.",
            PATTERNS,
            metavar="PATTERN",
            recorded=2,
        ),
    ] = ()
    components: Annotated[
        Mapping[str, str | None],
        Option(
            "Component of a pipeline to quantize, with its own scheme or that of --scheme. Repeatable. Default: the "
            "denoiser.",
            COMPONENTS,
            ("--component",),
            metavar="NAME[=SCHEME]",
            recorded=3,
        ),
    ] = field(default_factory=dict)
    component_only: Annotated[
        bool, Option("Write only that component, not the whole pipeline.", SWITCH, recorded=8)
    ] = False
    keep_original_files: Annotated[
        bool,
        Option(
            "Copy the weights files of the other components unchanged, in their own format. Users must download such a "
            "pipeline first.",
            SWITCH,
            recorded=8,
        ),
    ] = False
    include_embeddings: Annotated[bool, Option("Quantize embedding tables too.", SWITCH, recorded=8)] = False
    untie: Annotated[
        bool,
        Option("Write tied tensors (output head, embedding) as separate tensors.", SWITCH, recorded=8),
    ] = False
    allow_missing: Annotated[
        tuple[str, ...],
        Option(
            "Let the library initialize matching tensors if the checkpoint lacks them; PATTERN as for --skip. "
            "Repeatable.",
            PATTERNS,
            metavar="PATTERN",
            recorded=2,
        ),
    ] = ()
    drop_unknown: Annotated[
        bool,
        Option("Leave out tensors that the model class does not know (e.g. MTP layers).", SWITCH, recorded=8),
    ] = False
    default_skips: Annotated[
        bool,
        Option(
            "Also quantize layers that are skipped by default for quality: output head, routers, T5's wo.",
            SWITCH,
            ("--no-default-skips",),
            recorded=7,
        ),
    ] = True
    fuse_qkv: Annotated[
        bool,
        Option("First fuse the q, k and v projections of diffusers models that support it.", SWITCH, recorded=8),
    ] = False
    carry: Annotated[
        bool,
        Option(
            "Keep the 8-bit codes of a quantized source unchanged where the scheme's tensor class can hold them; "
            "dequantize and quantize only the rest.",
            SWITCH,
            recorded=8,
        ),
    ] = False
    dtype: Annotated[
        str | None,
        Option(
            "Dtype of unquantized tensors, and the dtype that quantized ones dequantize to; auto keeps the source's. "
            "Default: bfloat16, or the source's for a class that cannot run in bfloat16.",
            choice(*DTYPES),
            recorded=5,
        ),
    ] = None
    device: Annotated[
        str,
        Option(
            "Device to quantize on; cuda:0,cuda:1 or cuda:all use several.",
            metavar="auto|cpu|cuda|cuda:N|xpu",
            show_default=True,
            recorded=6,
        ),
    ] = "auto"
    layout_device: Annotated[
        str | None,
        Option(
            "Device that a packed layout (int4) is for. Default: the device that quantizes.",
            choice(*LAYOUT_DEVICES),
            recorded=5,
        ),
    ] = None
    max_shard_size: Annotated[
        int | None,
        Option(
            "Maximum tensor bytes per file, e.g. 5GB. Default: 45GB for diffusers (one file), 10GB for transformers.",
            SIZE,
            metavar="SIZE",
            recorded=5,
        ),
    ] = None
    format: Annotated[
        str,
        Option(
            "Format of the weights files: bin loads in more releases of torchao, safetensors holds no pickle.",
            choice(*FORMATS),
            show_default=True,
            recorded=5,
        ),
    ] = "bin"
    min_quantized: Annotated[
        float,
        Option(
            "Refuse to quantize less than this fraction of the parameters outside embeddings.",
            FRACTION,
            show_default=True,
            recorded=5,
        ),
    ] = 0.5
    output: Annotated[Path, Option("Output folder.", FOLDER, ("-o", "--output"), show_default=True)] = Path("out")
    overwrite: Annotated[
        bool,
        Option("Replace an earlier result of aoconvert in the output folder, never anything else.", SWITCH),
    ] = False
    resume: Annotated[bool, Option("Start over instead of resuming a stopped run.", SWITCH, ("--no-resume",))] = True
    revision: Revision = None
    lora: Annotated[
        tuple[str, ...],
        Option(
            "Add a LoRA to the weights before they are quantized, times WEIGHT (default: 1). Repeatable.",
            LORAS,
            metavar="REPO|FILE[@WEIGHT]",
            recorded=4,
        ),
    ] = ()
    config: Annotated[
        str | None,
        Option(
            "With a SOURCE that is one weights file: folder or repo with its diffusers config. Default: what diffusers "
            "takes for such a file, or what transformers makes of a GGUF file.",
            REFERENCE,
            metavar="FOLDER|REPO",
            recorded=4,
        ),
    ] = None
    subfolder: Annotated[
        str | None,
        Option("Folder inside the source, or inside --config, to use.", recorded=4, pattern=r"\w[\w./-]*"),
    ] = None
    variant: Annotated[str | None, Option("Weights variant, e.g. fp16.", recorded=4)] = None
    token: Token = field(default=None, repr=False)
    cache_dir: CacheDir = None
    local_files_only: LocalFilesOnly = False
    trust_remote_code: Annotated[
        bool,
        Option("Run model code from the checkpoint.", SWITCH, recorded=8),
    ] = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.format not in FORMATS:
            raise UsageError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        check_device_names(self.device)
        self._check_scheme()
        if not 0 <= self.min_quantized <= 1:
            raise UsageError(f"min_quantized {self.min_quantized} is not a fraction between 0 and 1")
        if self.max_shard_size is not None and self.max_shard_size <= 0:
            raise UsageError("max_shard_size must be positive")
        for option, patterns in (("--skip", self.skip), ("--allow-missing", self.allow_missing)):
            for pattern in patterns:
                if pattern.startswith("re:"):
                    try:
                        re.compile(pattern[3:])
                    except re.error as error:
                        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from None

    @property
    def searches(self) -> bool:
        """Whether the schemes are to be searched."""
        return self.scheme is not None and self.scheme.strip().lower() == AUTO

    def _check_scheme(self) -> None:
        if AUTO in (scheme.strip().lower() for scheme in self.components.values() if scheme):
            raise UsageError(
                "auto cannot be the scheme of a single component", hint="--scheme auto, and --component NAME"
            )
        own = bool(self.components) and all(self.components.values())
        if self.scheme is None and self.recipe is None and not own:
            raise UsageError("no scheme", hint="--scheme NAME (see 'aoconvert schemes'), or --recipe FILE")
        if self.scheme is None and not own and (self.group_size is not None or self.settings):
            raise UsageError(
                "--group-size and --set need --scheme, which is missing",
                hint="a recipe has its own group_size and set",
            )
        if self.layout_device not in (None, *LAYOUT_DEVICES):
            raise UsageError(f"layout_device {self.layout_device!r} is not one of {', '.join(LAYOUT_DEVICES)}")
        goals = {name: getattr(self, name) for name in ("min_sqnr", "target_bits", "target_size")}
        given = [name for name, value in goals.items() if value is not None]
        beside = [name for name in ("candidates", "sensitivity") if getattr(self, name)]
        flags = ", ".join("--" + name.replace("_", "-") for name in (*given, *beside))
        if flags and not self.searches:
            raise UsageError(f"{flags}: these need --scheme auto", hint="--scheme auto")
        if not self.searches:
            return
        if self.carry:
            raise UsageError(
                "--carry and --scheme auto exclude each other: auto measures what quantizing again costs",
                hint="--scheme float8wo or int8wo, as the source is quantized",
            )
        if self.recipe is not None:
            raise UsageError("--scheme auto and --recipe exclude each other: auto writes the recipe itself")
        if self.group_size is not None or self.settings:
            raise UsageError("--scheme auto does not accept --group-size or --set", hint="--candidates int4wo,int8wo")
        if len(given) != 1:
            raise UsageError(
                "--scheme auto needs one goal",
                hint="--min-sqnr DB for each tensor, or --target-bits B or --target-size SIZE for the whole model",
            )
        if self.sensitivity is not None and self.min_sqnr is not None:
            raise UsageError(
                "--sensitivity and --min-sqnr exclude each other: the latter looks at each weight alone",
                hint="--target-bits B or --target-size SIZE",
            )
        goal = goals[given[0]]
        if goal <= 0 or (isinstance(goal, float) and not math.isfinite(goal)) or goal > _MOST_BYTES:
            raise UsageError(
                f"--{given[0].replace('_', '-')} must be a positive, finite number",
                hint="typical values are 30 dB, 5 bits, 8GB",
            )


def make_options(scheme: str | None, values: Mapping[str, Any]) -> QuantizeOptions:
    """Typed options out of keyword arguments, or of what was typed."""
    return QuantizeOptions(scheme=scheme, **read_values(QuantizeOptions, values))
