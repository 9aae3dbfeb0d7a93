"""``aoconvert card``."""

from __future__ import annotations

from pathlib import Path

import click

from aoconvert.cli.options import common
from aoconvert.cli.output import Output
from aoconvert.errors import PlanError

EPILOG = """\
--card-template names a Jinja template for the card's body. It runs in a sandbox, and its output is escaped for
Markdown.

\b
Its variables: title, repo_id, place, kind, class_name, schemes, picture, pictured_outputs, license, license_url,
source, code (load, usage, install, packages, strategy, to_device), proof (ok, reason, date, device, versions,
checks, example, forward, not_run), components, sizes, quality, costs, siblings, hardware, limits, verify, files,
copied, apart, command, date, versions, device_name, tool. Its filters: code, block("python"), link(url), size,
number, percent, plural.
aoconvert/cards/template.py documents them; aoconvert/cards/template.md.jinja is an example.

\b
Examples:
  aoconvert card
  aoconvert card ./out --write --repo-id user/CogVideoX-5b-int8wo
  aoconvert card --license other --set-metadata license_name=my-terms --set-metadata license_link=LICENSE
  aoconvert card --set-metadata "tags=[video, text-to-video]" --json
"""


@click.command("card", epilog=EPILOG)
@click.argument("path", metavar="[PATH]", type=click.Path(path_type=Path), default=Path("out"))
@click.option("--write", is_flag=True, help="Write README.md and its pictures into the folder.")
@click.option("--overwrite", is_flag=True, help="Replace a README.md that was edited by hand.")
@click.option(
    "--repo-id", metavar="REPO_ID", help="Repo that the card will be published in; the code on the card opens it."
)
@click.option(
    "--card-template",
    "template",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Jinja template for the card's body.",
)
@click.option("--license", metavar="NAME", help="Licence of the result, if the source's card names none.")
@click.option(
    "--set-metadata",
    "metadata",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the card's metadata; VALUE is a YAML scalar or list, an empty one removes the key. Repeatable.",
)
@common
def command(
    *,
    path: Path,
    write: bool,
    overwrite: bool,
    repo_id: str | None,
    template: Path | None,
    license: str | None,
    metadata: tuple[str, ...],
    out: Output,
) -> None:
    """Print the model card of a converted checkpoint. Default: ./out.

    The card is built from the manifest and the last verification, and says what was proven. With --write the paths of
    the files are printed in its place.
    """
    if overwrite and not write:
        raise click.UsageError("--overwrite needs --write")
    with out.watch(f"card of {path}"):
        from aoconvert import cards
        from aoconvert.cards.metadata import parse_metadata

        options = cards.CardOptions(template, license, parse_metadata(metadata))
        card = cards.render(path, options, repo_id=repo_id)
    if write and not overwrite and cards.is_edited(path):
        raise PlanError(
            [f"{path / cards.CARD_NAME} was edited by hand, or was not written by aoconvert"],
            hint="--overwrite replaces it; without --write the card is printed",
        )
    for line in card.warnings:
        out.warning(line)
    written = [str(place) for place in cards.write(path, card)] if write else []
    data = {
        "path": str(path),
        "card": card.text,
        "picture": card.picture,
        "siblings": card.siblings,
        "written": written,
        "warnings": list(card.warnings),
    }
    shown = "\n".join(written) or card.text.rstrip()
    out.result(lambda: shown, data, str(path / cards.CARD_NAME) if write else shown)
