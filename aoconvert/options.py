"""What the user asked for: one frozen value that the command line and the Python API both fill in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict

from aoconvert.environment import check_device_names
from aoconvert.errors import UsageError

AUTO = "auto"
LAYOUT_DEVICES = ("cpu", "cuda", "xpu")
DTYPES = ("bfloat16", "float16", "float32", "auto")
DEFAULT_DTYPE = "bfloat16"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MOST_BYTES = 10**24  # no goal is above it: floats can count it


class QuantizeKwargs(TypedDict, total=False):
    """``QuantizeOptions`` as keyword arguments, in the types that people have at hand."""

    group_size: int | None
    settings: Mapping[str, str]
    recipe: str | Path | None
    candidates: str | Sequence[str]
    min_sqnr: float | None
    target_bits: float | None
    target_size: int | str | None
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
    dtype: str | None
    device: str
    layout_device: str | None
    max_shard_size: int | str | None
    min_quantized: float
    output: str | Path
    overwrite: bool
    resume: bool
    revision: str | None
    subfolder: str | None
    variant: str | None
    token: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class QuantizeOptions:
    """Everything ``quantize`` and ``plan`` can be told.

    Attributes:
        scheme: scheme name, see ``aoconvert schemes``; ``auto`` searches; ``None`` where the recipe says all.
        group_size: values per scale along in_features, where the scheme has groups.
        settings: fields of the torchao config, as text.
        recipe: file with rules: which scheme for which tensors.
        candidates: schemes that ``auto`` chooses among.
        min_sqnr: least SQNR in dB that ``auto`` accepts for a tensor.
        target_bits: bits per weight that ``auto`` may spend on a component.
        target_size: bytes that ``auto`` may spend on the weights files.
        skip: exact tensor or module names, or ``re:`` patterns that match one fully; not quantized.
        components: pipeline parts to quantize → scheme name, or ``None`` for ``scheme``. Empty: the denoiser.
        component_only: write only that component, not the pipeline.
        keep_original_files: take the files of a pipeline's other parts over unchanged, not as ``.bin``.
        include_embeddings: quantize embedding tables too, with a scheme that they can take.
        untie: write tensors that share their memory as tensors of their own, so that they can be quantized apart.
        allow_missing: names or ``re:`` patterns as in ``skip``, of tensors that the checkpoint does not hold: they are
            left to the library, which makes them anew.
        drop_unknown: leave out the tensors that the model class does not know.
        default_skips: leave alone what a careful converter leaves alone (output head, routers …).
        fuse_qkv: fuse the query, key and value projections of a diffusers model before they are quantized.
        dtype: of what is not quantized and the base of what is; ``auto`` keeps the source's. ``None`` is bfloat16, or
            the source's for a model whose class cannot run in bfloat16.
        device: where to quantize: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``xpu``.
        layout_device: device type that packed weights are for; default: where they are quantized.
        max_shard_size: bytes of tensors a file, or ``None`` for the library's default.
        min_quantized: least fraction of the parameters outside embeddings that must be quantized.
        output: folder that will hold the result.
        overwrite: replace an earlier result there.
        resume: go on with what a run that was stopped left beside it; otherwise start afresh.
        revision: branch, tag or commit of a Hub repo.
        subfolder: folder inside the source to start from.
        variant: weights variant, e.g. ``fp16``.
        token: Hub token; never stored, never shown.
        cache_dir: Hub cache.
        local_files_only: do not touch the network.
        trust_remote_code: run the model code inside the checkpoint.
    """

    scheme: str | None
    group_size: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    recipe: Path | None = None
    candidates: tuple[str, ...] = ()
    min_sqnr: float | None = None
    target_bits: float | None = None
    target_size: int | None = None
    skip: tuple[str, ...] = ()
    components: Mapping[str, str | None] = field(default_factory=dict)
    component_only: bool = False
    keep_original_files: bool = False
    include_embeddings: bool = False
    untie: bool = False
    allow_missing: tuple[str, ...] = ()
    drop_unknown: bool = False
    default_skips: bool = True
    fuse_qkv: bool = False
    dtype: str | None = None
    device: str = "auto"
    layout_device: str | None = None
    max_shard_size: int | None = None
    min_quantized: float = 0.5
    output: Path = Path("out")
    overwrite: bool = False
    resume: bool = True
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
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
            raise UsageError("auto is not the scheme of one component", hint="--scheme auto, and --component NAME")
        own = bool(self.components) and all(self.components.values())
        if self.scheme is None and self.recipe is None and not own:
            raise UsageError("no scheme", hint="--scheme NAME (see 'aoconvert schemes'), or --recipe FILE")
        if self.scheme is None and not own and (self.group_size is not None or self.settings):
            raise UsageError(
                "--group-size and --set are for --scheme, and there is none",
                hint="a recipe has group_size and set of its own",
            )
        if self.layout_device not in (None, *LAYOUT_DEVICES):
            raise UsageError(f"layout_device {self.layout_device!r} is not one of {', '.join(LAYOUT_DEVICES)}")
        goals = {name: getattr(self, name) for name in ("min_sqnr", "target_bits", "target_size")}
        given = [name for name, value in goals.items() if value is not None]
        flags = ", ".join(
            "--" + name.replace("_", "-") for name in (*given, *(["candidates"] if self.candidates else []))
        )
        if flags and not self.searches:
            raise UsageError(f"{flags}: only --scheme auto searches", hint="--scheme auto")
        if not self.searches:
            return
        if self.recipe is not None:
            raise UsageError("--scheme auto and --recipe exclude each other: auto makes the recipe")
        if self.group_size is not None or self.settings:
            raise UsageError("--scheme auto takes no --group-size and no --set", hint="--candidates int4wo,int8wo")
        if len(given) != 1:
            raise UsageError(
                "--scheme auto needs one goal",
                hint="--min-sqnr DB for every tensor, or --target-bits B or --target-size SIZE for the whole",
            )
        goal = goals[given[0]]
        if goal <= 0 or (isinstance(goal, float) and not math.isfinite(goal)) or goal > _MOST_BYTES:
            raise UsageError(
                f"--{given[0].replace('_', '-')} must be a positive number, and not without end",
                hint="usual are 30 dB, 5 bits, 8GB",
            )


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``500MB``, ``2GiB`` or a plain number (powers of ten, like the Hub's tools).

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size", hint="write 5GB, 500MB or 2GiB")
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


def make_options(scheme: str | None, options: Mapping[str, Any]) -> QuantizeOptions:
    """Typed options out of keyword arguments."""
    values = dict(options)
    for name in ("output", "cache_dir", "recipe"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    for name in ("max_shard_size", "target_size"):
        if isinstance(values.get(name), str):
            values[name] = parse_size(values[name])
    for name in ("skip", "candidates", "allow_missing"):
        if name in values:
            values[name] = (values[name],) if isinstance(values[name], str) else tuple(values[name])
    if isinstance(values.get("components"), Sequence):
        names = [values["components"]] if isinstance(values["components"], str) else values["components"]
        values["components"] = dict.fromkeys(names)
    return QuantizeOptions(scheme=scheme, **values)
