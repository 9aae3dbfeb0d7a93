"""The model card of a push: rendered for the repo, or the one that somebody wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aoconvert import cards
from aoconvert.cards import CARD_NAME, PICTURE_NAME
from aoconvert.checkpoint.manifest import CARD_BYTES, SIBLINGS_NAME
from aoconvert.errors import PlanError, WriteError
from aoconvert.files import read_limited
from aoconvert.hub.types import PushOptions, UploadFile
from aoconvert.sources.folder import stays_inside


@dataclass(frozen=True)
class CardFiles:
    """The card, and its pictures where there are some.

    Attributes:
        files: to be sent.
        text: of the card.
        warnings: one line each.
        kept: the folder's own card is sent as it is, and nothing is written.
    """

    files: tuple[UploadFile, ...]
    text: str
    warnings: tuple[str, ...]
    kept: bool


def own_card(folder: Path, options: PushOptions) -> CardFiles | None:
    """The card that somebody wrote, or edited by hand; ``None`` where there is none.

    Raises:
        PlanError: it cannot be sent, or the options would change it.
    """
    return _keep_card(folder, options) if cards.is_edited(folder) else None


def render_card(folder: Path, repo_id: str, options: PushOptions) -> CardFiles:
    """The card that is made for a repo.

    Raises:
        AoconvertError: see ``aoconvert.cards.render``.
    """
    wanted = cards.CardOptions(
        template=options.card_template,
        license=options.license,
        metadata=options.metadata,
    )
    card = cards.render(folder, wanted, repo_id=repo_id, revision=options.branch)
    texts = {CARD_NAME: card.text, **card.pictures}
    files = [UploadFile.from_bytes(name, text.encode()) for name, text in texts.items()]
    return CardFiles(tuple(files), card.text, card.warnings, kept=False)


def write_card(folder: Path, card: CardFiles) -> str | None:
    """Put what was rendered into the folder, where it is not there yet; what went wrong, if something did."""
    if card.kept or all(_has(folder, file) for file in card.files):
        return None
    links = [file.path for file in card.files if (folder / file.path).is_symlink()]
    if links:  # a snapshot of the Hub cache: what it leads to belongs to somebody else
        return f"the card is on the Hub, but not in the folder: {' and '.join(links)} is a link"
    contents = {file.path: b"".join(file.blocks()).decode() for file in card.files}
    try:
        pictures = (contents.get(PICTURE_NAME), card.warnings, contents.get(SIBLINGS_NAME))
        cards.write(folder, cards.Card(contents[CARD_NAME], *pictures))
    except WriteError as error:
        return f"the card is on the Hub, but not in the folder: {error.message}"
    return None


def _has(folder: Path, file: UploadFile) -> bool:
    place = folder / file.path
    return place.is_file() and place.stat().st_size == file.size and place.read_bytes() == file.content


def _keep_card(folder: Path, options: PushOptions) -> CardFiles:
    """The card that somebody wrote."""
    given = {"--card-template": options.card_template, "--license": options.license, "--set-metadata": options.metadata}
    names = [name for name, value in given.items() if value]
    if names:
        raise PlanError(
            [f"{CARD_NAME} was written by hand: {' and '.join(names)} would be lost on it"],
            hint=f"edit {CARD_NAME}, or move it away to have a card generated",
        )
    found = [name for name in (CARD_NAME, PICTURE_NAME, SIBLINGS_NAME) if (folder / name).is_file()]
    outside = [f"{name} is a link that leaves the folder" for name in found if not stays_inside(folder, name)]
    if outside:
        raise PlanError(outside)
    files = tuple(UploadFile.from_bytes(name, read_limited(folder / name, CARD_BYTES)) for name in found)
    text = _check_card(files[0])
    return CardFiles(files, text, (f"{CARD_NAME} was written by hand, and is sent unchanged",), kept=True)


def _check_card(card: UploadFile) -> str:
    """The text of a card whose front matter can be read."""
    from huggingface_hub.repocard import ModelCard

    try:
        text = b"".join(card.blocks()).decode()
        ModelCard(text)
    except UnicodeDecodeError:
        raise PlanError([f"{CARD_NAME} is not UTF-8"]) from None
    except Exception as error:  # whatever the YAML parser, or the client's card class, does not like
        said = " ".join(str(error).split())[:200]
        raise PlanError([f"the front matter of {CARD_NAME} cannot be read: {said}"]) from error
    return text
