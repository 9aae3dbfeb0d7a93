"""What the source's own model card says: the front matter of its README.md."""

from __future__ import annotations

from typing import Any

from aoconvert.checkpoint.manifest import SourceCard
from aoconvert.sources import Source

_MOST = 200  # characters of a value; entries of a list


def read_card(source: Source) -> SourceCard | None:
    """The parts of the source's card that a card of the result takes over; nothing is guessed.

    Returns:
        ``None`` where there is no card, or none whose YAML can be read.
    """
    if not source.has("README.md"):
        return None
    from huggingface_hub import metadata_load

    try:
        values = metadata_load(source.local("README.md"))
    except Exception:  # a card with broken YAML says nothing
        return None
    if not isinstance(values, dict):
        return None
    license_link = _text(values.get("license_link"))
    if license_link and source.repo_id and source.revision and not license_link.startswith(("http://", "https://")):
        license_link = (
            f"https://huggingface.co/{source.repo_id}/blob/{source.revision}/{license_link.removeprefix('./')}"
        )
    return SourceCard(
        license=_text(", ".join(_texts(values.get("license")))),
        license_name=_text(values.get("license_name")),
        license_link=license_link,
        language=_texts(values.get("language")),
        pipeline_tag=_text(values.get("pipeline_tag")),
        library_name=_text(values.get("library_name")),
        tags=_texts(values.get("tags")),
        prior=_texts(values.get("prior")),
    )


def _text(value: Any) -> str | None:
    """A short line; YAML reads a language called "no" as a boolean, which says nothing."""
    if not isinstance(value, str) or not value.strip() or len(value) > _MOST or not value.isprintable():
        return None
    return value.strip()


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for item in values[:_MOST] if (text := _text(item)) is not None]
