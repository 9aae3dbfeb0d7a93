"""What all documents share."""

from __future__ import annotations

from pydantic import Field

from aoconvert.checkpoint.json_model import JsonModel


class Document(JsonModel):
    """A JSON object. Keys are only added, so readers must let unknown ones pass."""


class Error(Document):
    """What went wrong. ``problems`` is everything that is wrong, ``message`` all of it in one line."""

    type: str
    message: str
    hint: str | None
    exit_code: int
    retryable: bool = Field(description="the same command can succeed later without any change")
    problems: list[str]


class ErrorDocument(Document):
    """Any command, in place of its own document, when it fails."""

    error: Error


class SizedFile(Document):
    """A file and its size in bytes."""

    path: str
    size: int
