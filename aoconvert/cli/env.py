"""``aoconvert env``."""

from __future__ import annotations

from typing import Any

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import Output

EXAMPLES = """\b
Examples:
  aoconvert env
  aoconvert env --json
"""


@click.command("env", epilog=EXAMPLES)
@common
def command(*, out: Output) -> None:
    """Show what aoconvert would run with here: versions, devices, compiler, caches. Paste it into a bug report.

    The output contains no secrets: it says only whether there is a Hub token.
    """
    with out.watch("look around"):
        from aoconvert.environment import survey

        found = survey()
    out.result(lambda: Output.table(_rows(found)), found, found["device"])


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from aoconvert.humanize import size

    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows += [("platform", found["platform"]), ("cores", str(found["cores"])), ("memory", size(found["memory_bytes"]))]
    for device in found["devices"]:
        capability = f", compute capability {'.'.join(map(str, device['capability']))}" if device["capability"] else ""
        rows.append(("device", f"{device['device']}: {device['name']}{capability}"))
    rows.append(("--device auto", found["device"]))
    rows.append(("kernels", found["kernels"]))
    for name, place in found["caches"].items():
        rows.append((f"{name} cache", place or "off"))
    rows.append(("Hub", f"{found['hub']['endpoint']}, {'with' if found['hub']['token'] else 'without'} a token"))
    rows += [(name, value) for name, value in found["variables"].items()]
    return rows
