"""``aoconvert verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common, with_options
from aoconvert.cli.output import FOLD, NUMBER, WHOLE, Output
from aoconvert.errors import UsageError
from aoconvert.options import HubOptions

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
@click.option(
    "--source", help="Have the library open this original too, a folder or a repo id, and compare everything."
)
@click.option("--source-revision", help="Branch, tag or commit of the source. Default: the commit that was quantized.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "from-pretrained", "assign"]),
    default="auto",
    show_default=True,
    help="Way of loading to prove; auto takes assign where from_pretrained fails.",
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N|xpu", help="Where to open the model."
)
@click.option("--no-reload", is_flag=True, help="Do not open the model: files, pickles, versions and torch.load only.")
@click.option("--no-forward", is_flag=True, help="No forward pass.")
@click.option("--example", is_flag=True, help="Also run the model card's example, at the smallest sizes.")
@click.option("--require-device", is_flag=True, help="A layout whose device is not here is a failure.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code that is inside the checkpoint and the source.")
@with_options(HubOptions)
@common
def command(
    *,
    checkpoint: str,
    out: Output,
    no_reload: bool,
    no_forward: bool,
    **choices: Any,
) -> int:
    """Prove that a converted checkpoint loads, in a fresh process. Default: ./out.

    Checks the manifest, the files, the pickles (read without executing anything), the versions, torch.load with
    weights_only, from_pretrained, the numbers, and one forward pass; with --source also that the library opens the
    same model, tokenizers and configs out of both. Writes aoconvert.verify.json.
    """
    if checkpoint == _DEFAULT and not Path(checkpoint).exists():
        raise UsageError(f"no ./{_DEFAULT} here", hint="aoconvert verify PATH, or a model on the Hub as user/repo")
    from aoconvert import api

    with out.watch(f"verify {checkpoint}") as progress:
        report = api.verify(checkpoint, progress=progress, reload=not no_reload, forward=not no_forward, **choices)
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
