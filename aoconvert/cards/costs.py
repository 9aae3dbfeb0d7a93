"""What a checkpoint costs to run, read from ``aoconvert.bench.json``, which anybody may have written.

A card shows it only where the report belongs to this very manifest, and shows only what is in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from aoconvert.cards.markdown import Md, unbroken
from aoconvert.checkpoint.bench import Bench, BenchRow, bench_of
from aoconvert.checkpoint.manifest import Manifest
from aoconvert.humanize import duration, rounded
from aoconvert.options.bench import BenchOptions
from aoconvert.options.fields import REFERENCE, SWITCH, options_of

_FACTS = ("device", "device_name", "threads", "peak")
_SHOWN = 60  # rows
_OPTIONS = {option.names(field)[-1]: option for field, option in options_of(BenchOptions).items()}
_PATTERNS = {
    "--source": REFERENCE.pattern,
    "--source-revision": "[0-9a-f]{40}",
    "--device": r"(cpu|cuda|xpu)(:\d{1,3})?",
}
_HIDDEN = frozenset({"--token", "--cache-dir", "--local-files-only", "--revision"})


def read_costs(folder: Path, manifest: Manifest, place: str) -> dict[str, Any] | None:
    """What the report in the folder says, for the card's template; ``None`` where there is none of this checkpoint.

    Args:
        folder, manifest: of the checkpoint.
        place: what the command on the card measures.
    """
    report = bench_of(folder)
    if report is None or not report.ok:
        return None
    ran = [row for row in report.rows if row.error is None]
    failed = [row for row in report.rows if row.error is not None]
    return {
        "rows": [_row(row, folder) for row in ran[:_SHOWN]],
        "modes": any(row.mode != "plain" for row in ran),
        "batches": any(row.batch_size != 1 for row in ran),
        "more": max(0, len(ran) - _SHOWN),
        "failures": list({(row.model, row.mode, row.error): _row(row, folder) for row in failed}.values())[:_SHOWN],
        "date": datetime.fromisoformat(report.date).date().isoformat(),
        "complete": report.complete,
        "runs": max(row.runs for row in report.rows),
        "environment": {**dict.fromkeys(_FACTS), **report.environment},
        "compiled": any(row.compile_seconds is not None for row in report.rows),
        "small": _is_small(report),
        "command": _command(report.command, manifest, place),
    }


def _row(row: BenchRow, folder: Path) -> dict[str, Any]:
    """A row without the place of the checkpoint, which a library's reason may name."""
    reason = row.error.replace(str(folder.resolve()), ".") if row.error is not None else None
    limits = () if row.seconds_min is None or row.seconds_max is None else (row.seconds_min, row.seconds_max)
    rate = None if row.per_second is None else f"{rounded(row.per_second)} {_plural(row.unit)}"
    time = None if row.seconds is None else Md(" (".join(map(unbroken, duration(row.seconds, *limits).split(" ("))))
    return {**row.model_dump(), "mode": row.mode, "error": reason, "time": time, "rate": rate}


def _plural(unit: str) -> str:
    return f"{unit}es" if unit.endswith("s") else f"{unit}s"


def _is_small(report: Bench) -> bool:
    """Whether a pipeline ran at a size that nobody asked for."""
    units = {row.unit for row in report.rows}
    return bool(units & {"denoising step", "image", "video", "call"}) and "--size" not in report.command


def _command(command: str, manifest: Manifest, place: str) -> str | None:
    """The command, where it can be one that aoconvert wrote: known options with values of their kind."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    if words[:2] != ["aoconvert", "bench"] or not _are_known(words[3:], manifest):
        return None
    return shlex.join(["aoconvert", "bench", place, *words[3:]])


def _are_known(words: Sequence[str], manifest: Manifest) -> bool:
    rest = iter(words)
    for name in rest:
        option = _OPTIONS.get(name)
        if option is None or name in _HIDDEN:
            return False
        if name == "--trust-remote-code" and not any(
            entry.load.kwargs.get("trust_remote_code") is True for entry in manifest.components
        ):
            return False
        if option.kind is SWITCH:
            continue
        value = next(rest, "")
        if name in _PATTERNS:
            if not re.fullmatch(_PATTERNS[name], value, re.ASCII):
                return False
        elif not option.shows(value):
            return False
    return True
