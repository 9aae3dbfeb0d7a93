"""Options that several commands share, spelled once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from aoconvert.cli.completion import complete_candidates, complete_component, complete_scheme_or_auto
from aoconvert.cli.output import Output
from aoconvert.errors import UsageError
from aoconvert.options import DTYPES, LAYOUT_DEVICES, QuantizeOptions, parse_size

F = TypeVar("F", bound=Callable[..., Any])


def common(function: F) -> F:
    """``--json``, ``-q/--quiet``, ``--no-progress``; the command receives an ``Output`` as ``out``."""

    @click.option("--json", "json_mode", is_flag=True, help="One JSON document on stdout, nothing else there.")
    @click.option("-q", "--quiet", is_flag=True, help="Print only the essential value.")
    @click.option("--no-progress", is_flag=True, help="No progress bar (there is none without a terminal).")
    @functools.wraps(function)
    def wrapped(*args: Any, json_mode: bool, quiet: bool, no_progress: bool, **kwargs: Any) -> Any:
        if json_mode and quiet:
            raise click.UsageError("--json and --quiet exclude each other")
        out = Output.from_flags(json_mode=json_mode, quiet=quiet, no_progress=no_progress)
        return function(*args, out=out, **kwargs)

    return wrapped  # type: ignore[return-value]


def conversion(function: F) -> F:
    """Everything ``quantize`` and ``plan`` take; the command receives ``options: QuantizeOptions``."""
    decorators = [
        click.argument("source", metavar="SOURCE"),
        click.option(
            "--scheme",
            metavar="NAME",
            shell_complete=complete_scheme_or_auto,
            help="What to quantize to; see 'aoconvert schemes'. auto searches.",
        ),
        click.option("--group-size", type=click.IntRange(min=1), help="Values per scale, where the scheme has groups."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A field of the torchao config."),
        click.option(
            "--recipe",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            metavar="FILE",
            help="Rules, which scheme for which tensors: a TOML file, or the config.json of an earlier result.",
        ),
        click.option(
            "--candidates",
            metavar="NAME,NAME",
            shell_complete=complete_candidates,
            help="Schemes that auto chooses among. Default: by what the layout can run.",
        ),
        click.option(
            "--min-sqnr", type=float, metavar="DB", help="auto: the smallest scheme a tensor that has this SQNR."
        ),
        click.option("--target-bits", type=float, metavar="B", help="auto: spend at most this many bits per weight."),
        click.option("--target-size", metavar="SIZE", help="auto: spend at most this many bytes, e.g. 8GB."),
        click.option(
            "--skip",
            multiple=True,
            metavar="PATTERN",
            help="Leave these unquantized: a tensor's or module's name, or re:REGEX (full match). Repeatable.",
        ),
        click.option(
            "--component",
            "components",
            multiple=True,
            metavar="NAME[=SCHEME]",
            shell_complete=complete_component,
            help="Part of a pipeline to quantize; its own scheme, or --scheme's. Repeatable. Default: the denoiser.",
        ),
        click.option("--component-only", is_flag=True, help="Write just that component, not the pipeline."),
        click.option(
            "--keep-original-files",
            is_flag=True,
            help="Take the other parts' weights over unchanged, not as .bin. Such a pipeline must be downloaded first.",
        ),
        click.option("--include-embeddings", is_flag=True, help="Quantize embedding tables too."),
        click.option(
            "--untie", is_flag=True, help="Write tied tensors (output head, embedding) as tensors of their own."
        ),
        click.option(
            "--allow-missing",
            multiple=True,
            metavar="PATTERN",
            help="Leave these to the library where the checkpoint lacks them: as --skip. Repeatable.",
        ),
        click.option(
            "--drop-unknown", is_flag=True, help="Leave out tensors that the model class does not know (MTP layers)."
        ),
        click.option(
            "--no-default-skips",
            "default_skips",
            flag_value=False,
            default=True,
            help="Quantize also what is left alone for quality: output head, routers, T5's wo.",
        ),
        click.option(
            "--fuse-qkv", is_flag=True, help="Fuse q, k and v projections first, in diffusers models that can."
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Of what is not quantized, and the base of what is; auto keeps the source's. Default: bfloat16, or "
            "the source's for a class that cannot run in it.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda|cuda:N|xpu",
            help="Where to quantize; cuda:0,cuda:1 or cuda:all share it.",
        ),
        click.option(
            "--layout-device",
            type=click.Choice(LAYOUT_DEVICES),
            help="What a packed layout (int4) is for. Default: where it is quantized.",
        ),
        click.option(
            "--max-shard-size",
            metavar="SIZE",
            help="Tensor bytes a file, e.g. 5GB. Default: 45GB for diffusers (one file), 10GB for transformers.",
        ),
        click.option(
            "--min-quantized",
            type=click.FloatRange(0, 1),
            default=0.5,
            show_default=True,
            help="Refuse when a smaller fraction of the parameters outside embeddings would be quantized.",
        ),
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path),
            default=Path("out"),
            show_default=True,
            help="Folder for the result.",
        ),
        click.option(
            "--overwrite",
            is_flag=True,
            help="Replace an earlier result of aoconvert there, and nothing of anybody else.",
        ),
        click.option(
            "--no-resume", "resume", flag_value=False, default=True, help="Start afresh, whatever a stopped run left."
        ),
        click.option("--revision", help="Branch, tag or commit of a Hub repo."),
        click.option("--subfolder", help="Folder inside the source to start from."),
        click.option("--variant", help="Weights variant, e.g. fp16."),
        click.option("--token", envvar="HF_TOKEN", help="Hub token; never stored."),
        click.option("--cache-dir", type=click.Path(path_type=Path), help="Hub cache folder."),
        click.option("--local-files-only", is_flag=True, help="Use the Hub cache, touch no network."),
        click.option("--trust-remote-code", is_flag=True, help="Run model code that is inside the checkpoint."),
    ]

    @functools.wraps(function)
    def wrapped(*args: Any, **values: Any) -> Any:
        rest = {name: values.pop(name) for name in list(values) if name not in _FIELDS}
        return function(*args, options=_options(values), **rest)

    for decorate in reversed(decorators):
        wrapped = decorate(wrapped)
    return wrapped  # type: ignore[return-value]


_FIELDS = frozenset(QuantizeOptions.__dataclass_fields__)


def _options(values: dict[str, Any]) -> QuantizeOptions:
    settings: dict[str, str] = {}
    for item in values.pop("settings"):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {item!r} is not KEY=VALUE")
        if settings.setdefault(key, value) != value:
            raise UsageError(f"--set {key} is given twice, as {settings[key]!r} and {value!r}")
    components: dict[str, str | None] = {}
    for item in values.pop("components"):
        name, equals, scheme = item.partition("=")
        if not name or (equals and not scheme):
            raise UsageError(f"--component {item!r} is neither NAME nor NAME=SCHEME")
        if components.setdefault(name, scheme or None) != (scheme or None):
            raise UsageError(f"--component {name} is given twice, with different schemes")
    shard, size = values.pop("max_shard_size"), values.pop("target_size")
    candidates = values.pop("candidates")
    names = [name.strip() for name in candidates.split(",")] if candidates is not None else []
    if not all(names):
        raise UsageError(f"--candidates {candidates!r} has an empty name", hint="--candidates int4wo,int8wo")
    return QuantizeOptions(
        settings=settings,
        components=components,
        candidates=tuple(names),
        target_size=parse_size(size) if size is not None else None,
        max_shard_size=parse_size(shard) if shard is not None else None,
        **values,
    )
