"""A model card as a value, in its folder, and what the user decides about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.manifest import CARD_BYTES, CARD_NAME, PICTURE_NAME, SIBLINGS_NAME
from aoconvert.checkpoint.seals import is_sealed
from aoconvert.errors import WriteError
from aoconvert.files import read_limited, write_whole


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
        siblings: of ``release.svg``, the variants of a release by size and error; ``None`` where there are not two.
    """

    text: str
    picture: str | None
    warnings: tuple[str, ...]
    siblings: str | None = None

    @property
    def pictures(self) -> dict[str, str]:
        """Pictures beside the card, by their names."""
        both = {PICTURE_NAME: self.picture, SIBLINGS_NAME: self.siblings}
        return {name: picture for name, picture in both.items() if picture is not None}


def is_edited(folder: Path) -> bool:
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
    """Put the card into the folder, its pictures first.

    Returns:
        The files that were written.

    Raises:
        WriteError: disk full, or no permission.
    """
    texts = {**card.pictures, CARD_NAME: card.text}
    for name, text in texts.items():
        try:
            write_whole(folder / name, text.encode())
        except OSError as error:
            raise WriteError(f"{folder / name}: {error.strerror or error}") from error
    return tuple(folder / name for name in texts)
