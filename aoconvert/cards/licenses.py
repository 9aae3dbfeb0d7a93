"""The licence of a card: the source's, as its own card says it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aoconvert.cards.hub_names import LICENSES
from aoconvert.checkpoint.manifest import Manifest, SourceCard
from aoconvert.errors import PlanError

_HUB = "https://huggingface.co"
_NAME = re.compile(r"[a-z0-9-.]+")  # the Hub's own pattern
_LINK = re.compile(r"(https://)?[\w./%+~=@#-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class SourceLicense:
    """What the source's card says of its licence.

    Attributes:
        said: the words of the card, ``None`` where it says nothing.
        terms: the same as the keys ``license``, ``license_name`` and ``license_link`` that the Hub takes.
        listed: the card names an id of the Hub's list.
    """

    said: str | None
    terms: Mapping[str, str | None]
    listed: bool = True

    @property
    def id(self) -> str | None:
        """The id that the Hub has for it; ``other`` for what is on no list."""
        return self.terms["license"]


def of_source(manifest: Manifest) -> SourceLicense:
    """The source's licence: an id that the Hub knows, else ``other`` with the card's own words for its name."""
    card = manifest.source.card or SourceCard()
    said = card.license or manifest.source.license
    link = card.license_link if _LINK.fullmatch(card.license_link or "") else None
    name = card.license_name
    if said is None:
        return SourceLicense(None, {"license": None, "license_name": None, "license_link": None})
    if said.lower() not in LICENSES:  # the Hub would refuse it
        name = name or said
        link = link or _source_page(manifest)
        terms = {"license": "other", "license_name": _spell(name), "license_link": link}
        return SourceLicense(said, terms, listed=False)
    return SourceLicense(name or said, {"license": said.lower(), "license_name": _spell(name), "license_link": link})


def _spell(name: str | None) -> str | None:
    """A name as the Hub takes it: small letters, digits, ``-`` and ``.``."""
    if name is None or _NAME.fullmatch(name):
        return name
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")[:60] or None


def _source_page(manifest: Manifest) -> str | None:
    page = f"{_HUB}/{manifest.source.repo_id}"
    return page if manifest.source.repo_id and _LINK.fullmatch(page) else None


def read_chosen(known: SourceLicense, license: str | None) -> Mapping[str, str | None]:
    """The terms of ``--license``, which says what the source does not.

    Raises:
        PlanError: the source says something else.
    """
    asked = license.lower() if license is not None and license.lower() in LICENSES else license
    if known.id in (None, "unknown"):
        return {"license": asked, "license_name": None, "license_link": None}
    if asked == known.id:
        return known.terms
    raise PlanError(
        [f"--license {license} contradicts the source's card, which says {known.said}"],
        hint="leave it out; if you hold the rights, --set-metadata license=… sets another licence",
    )


def deviations(known: SourceLicense, values: Mapping[str, Any]) -> Iterable[str]:
    """Where the front matter says otherwise than the source's card; one line each."""
    unlisted = known.said if known.id == "other" and not known.listed else None
    if unlisted is not None and unlisted.lower() != known.terms["license_name"]:
        yield (
            f"the source's licence, {unlisted!r}, is not on the Hub's list: the card gives it as license_name, "
            "with license: other"
        )
    if known.id not in (None, "unknown") and values["license"] != known.id:
        yield f"licence {values['license'] or 'left out'}: the source's card says {known.said}"


def show_license(manifest: Manifest, values: Mapping[str, Any]) -> str | None:
    """The licence in the text of the card: in the source's own words where it is the source's."""
    known = of_source(manifest)
    if known.id is not None and all(values.get(key) == value for key, value in known.terms.items()):
        return known.said
    return values.get("license_name") or values.get("license")
