"""The Python API. The command line is a thin layer on it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.options import QuantizeOptions, parse_size
from aoconvert.progress import Progress, Silent

if TYPE_CHECKING:
    from aoconvert.engine.run import QuantizeResult
    from aoconvert.planning import Plan


def plan(source: str | Path, scheme: str, **options: Any) -> Plan:
    """Decide everything about a conversion and write nothing. No weights are read.

    Args:
        source: a Hub repo id or a folder.
        scheme: a scheme name, see ``aoconvert schemes``.
        **options: fields of ``aoconvert.QuantizeOptions``; paths and sizes may be text.

    Returns:
        The plan: one entry a tensor, exact output sizes, what the run needs.

    Raises:
        PlanError: with every problem at once.
        SourceError: the source cannot be read.
        UsageError: an unknown scheme, or options that make no sense.
        HubError: the Hub said no.
    """
    return plan_options(source, make_options(scheme, options))


def quantize(source: str | Path, scheme: str, *, progress: Progress | None = None, **options: Any) -> QuantizeResult:
    """Quantize a checkpoint into ``output`` (default ``./out``), one tensor at a time.

    Args:
        source: a Hub repo id or a folder.
        scheme: a scheme name, see ``aoconvert schemes``.
        progress: is told what happens; default: silent.
        **options: fields of ``aoconvert.QuantizeOptions``; paths and sizes may be text.

    Returns:
        What was done; ``result.output`` is the folder, ``result.manifest`` what is in it.

    Raises:
        AoconvertError: see ``plan``; also ReadError, WriteError and QuantizeError. Nothing is left half-written.
    """
    return quantize_options(source, make_options(scheme, options), progress=progress or Silent())


def make_options(scheme: str, options: Mapping[str, Any]) -> QuantizeOptions:
    """Typed options out of keyword arguments."""
    values = dict(options)
    for name in ("output", "cache_dir"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    if isinstance(values.get("max_shard_size"), str):
        values["max_shard_size"] = parse_size(values["max_shard_size"])
    if isinstance(values.get("skip"), str):
        values["skip"] = (values["skip"],)
    if "skip" in values:
        values["skip"] = tuple(values["skip"])
    if isinstance(values.get("components"), Sequence):
        names = [values["components"]] if isinstance(values["components"], str) else values["components"]
        values["components"] = dict.fromkeys(names)
    return QuantizeOptions(scheme=scheme, **values)


def plan_options(source: str | Path, options: QuantizeOptions, *, need_weights: bool = False) -> Plan:
    """``plan`` with its options already made."""
    from aoconvert import schemes
    from aoconvert.planning.make import make
    from aoconvert.sources import resolve

    schemes.find(options.scheme, options.settings)  # a wrong name is said before anything is fetched
    resolved = resolve(
        str(source),
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
        trust_remote_code=options.trust_remote_code,
    )
    return make(resolved, options, need_weights=need_weights)


def quantize_options(source: str | Path, options: QuantizeOptions, *, progress: Progress) -> QuantizeResult:
    """``quantize`` with its options already made."""
    from aoconvert.engine.run import run

    made = plan_options(source, options, need_weights=True)
    total = sum(made.source.files()[path].size for path in made.fetch)
    if made.source.kind == "hub":
        progress.start("download", total)
        done = 0

        def report(fetched: int, _: int) -> None:
            nonlocal done
            progress.advance(fetched - done)
            done = fetched

        made.source.fetch(made.fetch, report)
        progress.finish()
    return run(made, progress, command=command_line(made, options))


def command_line(made: Plan, options: QuantizeOptions) -> str:
    """The command that makes the same result again: no token, no absolute path, the revision pinned."""
    words = ["aoconvert", "quantize", made.source.repo_id or made.source.label, "--scheme", options.scheme]
    if made.source.revision:
        words += ["--revision", made.source.revision]
    if options.group_size is not None:
        words += ["--group-size", str(options.group_size)]
    words += [word for key, value in options.settings.items() for word in ("--set", f"{key}={value}")]
    words += [word for pattern in options.skip for word in ("--skip", pattern)]
    for name, scheme in options.components.items():
        words += ["--component", f"{name}={scheme}" if scheme else name]
    defaults = QuantizeOptions(scheme=options.scheme)
    for flag in ("subfolder", "variant", "dtype", "max_shard_size", "min_quantized"):
        if getattr(options, flag) != getattr(defaults, flag):
            words += ["--" + flag.replace("_", "-"), str(getattr(options, flag))]
    if made.device != "cpu":
        words += ["--device", made.device]
    words += [
        f"--{flag.replace('_', '-')}" for flag in ("component_only", "trust_remote_code") if getattr(options, flag)
    ]
    return shlex.join(words)
