"""Plans of one source, as they were asked for: the source is found, and with ``auto`` the schemes are searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.errors import AoconvertError, Interrupted, UsageError
from aoconvert.options import QuantizeOptions
from aoconvert.planning.sharing import Shared

if TYPE_CHECKING:
    from aoconvert.planning import Plan
    from aoconvert.progress import Progress
    from aoconvert.sources import Source


def plan_all(
    source: str | Path, wanted: Sequence[QuantizeOptions], progress: Progress, *, elsewhere: bool = False
) -> list[Plan | AoconvertError]:
    """Plan several conversions of one source; what they have in common is read and opened once.

    Args:
        source: a Hub repo id, a folder, or one weights file.
        wanted: the options of each.
        progress: is told what happens.
        elsewhere: another machine will carry them out: a disk here that is too small is only a warning.

    Returns:
        The plan of each, or why there is none, in the order of ``wanted``.

    Raises:
        Interrupted: Ctrl-C.
    """
    shared = Shared()
    made: list[Plan | AoconvertError] = []
    for options in wanted:
        try:
            check_schemes(options)
            found = shared.once(options, ("source",), partial(resolve_source, source, options))
            plan = make_plan(found, options, progress, need_weights=False, elsewhere=elsewhere, shared=shared)
            made.append(plan)
        except Interrupted:
            raise
        except AoconvertError as error:
            made.append(error)
    return made


def make_plan(
    source: Source,
    options: QuantizeOptions,
    progress: Progress,
    *,
    need_weights: bool,
    elsewhere: bool = False,
    shared: Shared | None = None,
) -> Plan:
    """Build the plan; with ``auto`` the schemes are searched first. Raises as ``build_plan``."""
    from aoconvert.planning.build import build_plan

    shared = shared or Shared()
    if not options.searches:
        return build_plan(source, options, need_weights=need_weights, elsewhere=elsewhere, shared=shared)
    from aoconvert.searching.search import search
    from aoconvert.sources.download import download

    found = search(source, options, progress, lambda paths: download(source, paths, progress))
    plan = build_plan(source, options, need_weights=need_weights, elsewhere=elsewhere, rules=found.rules, shared=shared)
    return replace(plan, warnings=(*plan.warnings, *found.warnings))


def check_schemes(options: QuantizeOptions) -> None:
    """Refuse the name of a scheme that does not exist, before anything is fetched.

    Raises:
        UsageError: as ``schemes.find``.
    """
    from aoconvert import schemes

    for name in {options.scheme, *options.components.values(), *options.candidates}:
        if name is not None and not (name == options.scheme and options.searches):
            schemes.find(name, options.settings)


def resolve_source(source: str | Path, options: QuantizeOptions) -> Source:
    """Find the source, and the config of a single file.

    Raises:
        SourceError, HubError: it cannot be found.
        UsageError: a config for a source that has its own.
    """
    from aoconvert.sources import resolve
    from aoconvert.sources.file import FileSource

    found = resolve(str(source), options.hub, trust_remote_code=options.trust_remote_code, single_file=True)
    if isinstance(found, FileSource):
        from aoconvert.models.single_file import add_config

        return add_config(found, options.config, options.subfolder, options.hub, whole=not options.component_only)
    if options.config is not None:
        raise UsageError("--config is for a single weights file; this source has its own", hint="omit --config")
    return found
