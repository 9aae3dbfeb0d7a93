"""Model cards: ``README.md`` and a picture of the error, out of a manifest and the verification that belongs to it.

The interface of the package; what does the work is imported when it is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aoconvert.errors import WriteError
from aoconvert.files import read_limited, write_whole
from aoconvert.manifest import CARD_BYTES
from aoconvert.manifest import CARD_NAME as CARD_NAME
from aoconvert.manifest import PICTURE_NAME as PICTURE_NAME
from aoconvert.planning.overwriting import tidy
from aoconvert.seals import is_sealed, seal


@dataclass(frozen=True)
class CardOptions:
    """What the user decides about a card.

    Attributes:
        template: a Jinja template in place of aoconvert's; see ``cards.template`` for its variables.
        license: where the source's card names none.
        metadata: values of the front matter that replace what is there; ``None`` leaves a key out.
    """

    template: Path | None = None
    license: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """A rendered card.

    Attributes:
        text: of ``README.md``.
        picture: of ``sqnr.svg``; ``None`` where no error was measured.
        warnings: what its reader will miss, such as a licence; one line each.
    """

    text: str
    picture: str | None
    warnings: tuple[str, ...]


def render(folder: Path, options: CardOptions, *, repo_id: str | None = None, revision: str | None = None) -> Card:
    """The card of a checkpoint: the same manifest, report and options give the same bytes.

    Args:
        folder: the checkpoint.
        options: what the user decides.
        repo_id: where it will be published; without it the code on the card opens the folder.
        revision: the branch, where it is not the default one.

    Raises:
        UsageError: metadata that the Hub does not know, a repo id that is none, or a template that fails.
        SourceError: no manifest, or not a valid one.
    """
    from aoconvert.cards.make import make

    tidy(folder)
    made, picture, warnings = make(folder, options, repo_id, revision)
    return Card(seal(made), picture, warnings)


def edited(folder: Path) -> bool:
    """Whether the folder has a ``README.md`` that aoconvert did not write, or that was changed since."""
    try:
        content = read_limited(folder / CARD_NAME, CARD_BYTES)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise WriteError(f"{folder / CARD_NAME}: {error.strerror or error}") from error
    return not is_sealed(content)


def has_text(folder: Path) -> bool:
    """Whether the folder's ``README.md`` has more than a front matter."""
    content = read_limited(folder / CARD_NAME, CARD_BYTES).replace(b"\r\n", b"\n")
    return bool(re.sub(rb"\A---\n.*?\n---\s*(\n|\Z)", b"", content, flags=re.DOTALL).strip())


def write(folder: Path, card: Card) -> tuple[Path, ...]:
    """Put the card into the folder, its picture first.

    Returns:
        The files that were written.

    Raises:
        WriteError: disk full, or no permission.
    """
    texts = [(PICTURE_NAME, card.picture)] if card.picture is not None else []
    texts.append((CARD_NAME, card.text))
    for name, text in texts:
        try:
            write_whole(folder / name, text.encode())
        except OSError as error:
            raise WriteError(f"{folder / name}: {error.strerror or error}") from error
    return tuple(folder / name for name, _ in texts)
