"""``aoconvert push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import FOLD, NUMBER, WHOLE, Output
from aoconvert.humanize import plural, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aoconvert.checkpoint.report import Report
    from aoconvert.hub.types import Pushed

EXAMPLES = """\b
Examples:
  aoconvert push user/CogVideoX-5b-int8wo
  aoconvert push user/CogVideoX-5b-int8wo ./out --private --dry-run
  aoconvert push org/model-fp8 --create-pr --license apache-2.0
  aoconvert push user/model --revision int4 --tag v1.0 --json
"""


@click.command("push", epilog=EXAMPLES)
@click.argument("repo_id", metavar="REPO_ID")
@click.argument("checkpoint", metavar="[PATH]", default="out", type=click.Path(path_type=Path))
@click.option("--private/--public", default=None, help="Visibility of a new repo; an existing repo keeps its own.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, created if it does not exist; or refs/pr/N.")
@click.option("--create-pr", is_flag=True, help="Open a pull request; a second run continues the same one.")
@click.option("--commit-message", metavar="TEXT", help="First line of the commit.")
@click.option("--commit-description", metavar="TEXT", help="Text of the commit message below the first line.")
@click.option("--tag", metavar="NAME", help="Tag the commit with this name.")
@click.option("--collection", metavar="SLUG", help="Add the repo to this collection.")
@click.option("--token", envvar="HF_TOKEN", help="Hub token; it is never stored.")
@click.option("--dry-run", is_flag=True, help="Show files, sizes and the card; change nothing.")
@click.option("--allow-unverified", is_flag=True, help="Publish even if no verification passed; the card says so.")
@click.option(
    "--rehash", is_flag=True, help="Compare every file's SHA-256 with the manifest, not just its modification time."
)
@click.option(
    "--replace",
    is_flag=True,
    help="Replace another model, other weights or files that aoconvert did not write.",
)
@click.option(
    "--verify-hub",
    is_flag=True,
    help="After the push, open the commit from the Hub with the card's code and an empty cache.",
)
@click.option(
    "--card-template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Jinja template for the card's body.",
)
@click.option("--license", metavar="ID", help="Licence of the result, if the source's card names none.")
@click.option(
    "--set-metadata",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the card's metadata. Repeatable.",
)
@common
def command(*, repo_id: str, checkpoint: Path, out: Output, settings: tuple[str, ...], **choices: Any) -> int:
    """Publish a converted checkpoint on the Hugging Face Hub, with its model card. Default: ./out.

    It checks for problems before it sends anything. It uploads the weights, then one commit changes the branch from
    what it was to the whole checkpoint, and then it compares what arrived with what was sent. After any failure the
    same command continues: it does not send again what has arrived.

    The same model in another scheme or version is an update. Another model on the branch (another source, class or
    shapes), other weights, and files that aoconvert did not write or that were changed there are errors without
    --replace.
    """
    with out.watch(f"push {checkpoint} to {repo_id}") as progress:
        from aoconvert.cards.metadata import parse_metadata
        from aoconvert.hub.push import push
        from aoconvert.hub.types import PushOptions

        options = PushOptions(metadata=parse_metadata(settings), **choices)
        done = push(checkpoint, repo_id, options, progress)
    for line in done.warnings:
        out.warning(line)
    out.result(lambda: table(done), done.to_dict(), done.url)
    return done.exit_code


def table(done: Pushed) -> RenderableType:
    """What was done, or would be, for people."""
    from rich.console import Group
    from rich.text import Text

    sent = [(Text(file.path), size(file.size), _describe(done, new=file.path in done.sent)) for file in done.files]
    deleted = [(Text(path), "", "to be deleted" if done.dry_run else "deleted") for path in done.deleted]
    rows = Output.table([*sent, *deleted], {"file": FOLD, "size": NUMBER, "": WHOLE})
    lines = [Text(_last_line(done), style="bold")]
    if done.verification is not None:
        lines.append(Text(_say_opened(done.verification)))
    if done.pr_url is not None:
        lines.append(Text(f"pull request: {done.pr_url}"))
    return Group(Text(done.card), rows, *lines) if done.dry_run else Group(rows, *lines)


def _say_opened(report: Report) -> str:
    """What was run with the commit on the Hub."""
    ran = ", ".join(f"{one.what} (on {one.device})" for one in report.ran)
    return f"opened from the Hub with an empty cache; ran: {ran or 'nothing'}"


def _describe(done: Pushed, *, new: bool) -> str:
    if not new:
        return "there already"
    return "to be sent" if done.dry_run else "sent"


def _last_line(done: Pushed) -> str:
    if done.nothing_to_do:
        return f"nothing to do: {done.pr_url or done.url} holds exactly this"
    if done.dry_run:
        return f"nothing was changed; {plural(len(done.sent), 'file')}, {size(done.bytes_sent)}, would go to {done.url}"
    return f"published: {done.url} (commit {(done.commit or '')[:12]}, {size(done.bytes_sent)})"
