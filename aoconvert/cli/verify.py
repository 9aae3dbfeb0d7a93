"""``aoconvert verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common, with_options
from aoconvert.cli.output import FOLD, NUMBER, WHOLE, Output
from aoconvert.errors import UsageError
from aoconvert.options import VerifyOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.checkpoint.report import Report

EXAMPLES = """\b
Examples:
  aoconvert verify
  aoconvert verify ./out --source THUDM/CogVideoX-5b
  aoconvert verify user/CogVideoX-5b-int8wo --no-reload --json
"""

_DEFAULT = "out"
_COLORS = {"passed": "green", "failed": "red", "skipped": "yellow"}


@click.command("verify", epilog=EXAMPLES)
@click.argument("checkpoint", metavar="[PATH|REPO_ID]", default=_DEFAULT)
@with_options(VerifyOptions)
@common
def command(*, checkpoint: str, out: Output, **options: Any) -> int:
    """Prove that a converted checkpoint loads, in a fresh process. Default: ./out.

    It checks the manifest, the files, the pickles (read without executing anything), the versions, torch.load with
    weights_only, from_pretrained, the numbers, and one forward pass; with --source also that the library opens the
    same model, tokenizers and configs from both. It writes aoconvert.verify.json.
    """
    if checkpoint == _DEFAULT and not Path(checkpoint).exists():
        raise UsageError(f"no ./{_DEFAULT} here", hint="aoconvert verify PATH, or a model on the Hub as user/repo")
    from aoconvert import api

    with out.watch(f"verify {checkpoint}") as progress:
        report = api.verify(checkpoint, progress=progress, **options)
    if report.unwritten is not None:
        out.warning(report.unwritten)
    out.result(lambda: table(report), report.to_dict(), "ok" if report.ok else "failed")
    return report.exit_code


def table(report: Report) -> RenderableType:
    """The report for people."""
    from rich.console import Group
    from rich.markup import escape
    from rich.text import Text

    columns = {"check": WHOLE, "status": WHOLE, "what was found": FOLD, "s": NUMBER}
    rows = []
    for check in report.checks:
        color = _COLORS[check.status]
        rows.append((check.name, f"[{color}]{check.status}[/{color}]", escape(check.detail), f"{check.seconds:.1f}"))
    last = f"verified: {report.path}" if report.ok else f"not verified: {report.path}"
    return Group(Output.table(rows, columns), Text(last, style="bold"))
