"""Options that several commands share, spelled once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from aoconvert.cli.completion import complete_candidates, complete_component, complete_scheme_or_auto
from aoconvert.cli.output import Output
from aoconvert.options import QuantizeOptions
from aoconvert.options.fields import SWITCH, Option, defaults_of, options_of

F = TypeVar("F", bound=Callable[..., Any])


def common(function: F) -> F:
    """``--json``, ``-q/--quiet``, ``--no-progress``; the command receives an ``Output`` as ``out``.

    ``--json`` decides what stdout holds; ``--quiet`` beside it only silences stderr.
    """

    @click.option("--json", "json_mode", is_flag=True, help="Print one JSON document on stdout, and nothing else.")
    @click.option("-q", "--quiet", is_flag=True, help="Print only the essential value, such as a path, and no warning.")
    @click.option("--no-progress", is_flag=True, help="Show no progress bar (never shown without a terminal).")
    @functools.wraps(function)
    def wrapped(*args: Any, json_mode: bool, quiet: bool, no_progress: bool, **kwargs: Any) -> Any:
        out = Output.from_flags(json_mode=json_mode, quiet=quiet, no_progress=no_progress)
        return function(*args, out=out, **kwargs)

    return wrapped  # type: ignore[return-value]


def with_options(cls: type[Any], *, without: Collection[str] = ()) -> Callable[[F], F]:
    """Every option of a dataclass; the command receives what was typed by the names of the fields.

    Args:
        cls: the dataclass.
        without: fields that this command has no option for.
    """
    known, defaults = options_of(cls), defaults_of(cls)

    def decorate(function: F) -> F:
        for field, option in reversed([item for item in known.items() if item[0] not in without]):
            function = _click_option(field, option, defaults.get(field))(function)
        return function

    return decorate


def conversion(function: F) -> F:
    """Everything ``quantize`` and ``plan`` take: ``source``, and the fields of ``QuantizeOptions``."""
    return click.argument("source", metavar="SOURCE")(with_options(QuantizeOptions)(function))


_TYPES: dict[str, Any] = {
    "count": click.IntRange(min=1),
    "counts": click.IntRange(min=1),
    "number": click.FLOAT,
    "fraction": click.FloatRange(0, 1),
    "folder": click.Path(path_type=Path),
    "file": click.Path(path_type=Path, exists=True, dir_okay=False),
    "files": click.Path(path_type=Path, exists=True, dir_okay=False),
}
_REPEATABLE = frozenset({"loras", "patterns", "settings", "components", "counts", "files"})
_COMPLETIONS = {
    "scheme": complete_scheme_or_auto,
    "candidates": complete_candidates,
    "components": complete_component,
}


def _click_option(field: str, option: Option, default: Any) -> Callable[[F], F]:
    kind = option.kind
    shared: dict[str, Any] = {"help": option.help, "envvar": option.envvar, "metavar": option.metavar}
    names = option.names(field)
    if option.opposite is not None:
        names = (*names[:-1], f"{names[-1]}/{option.opposite}")
        shared |= {"default": default}
    elif kind is SWITCH:
        shared |= {"flag_value": False, "default": True} if default else {"is_flag": True}
    else:
        shared |= {"type": click.Choice(kind.choices) if kind.choices else _TYPES.get(kind.name)}
        shared |= {"multiple": kind.name in _REPEATABLE, "shell_complete": _COMPLETIONS.get(field)}
        shared |= {"default": default, "show_default": True} if option.show_default else {}
    return click.option(*names, field, **shared)
