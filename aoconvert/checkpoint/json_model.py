"""What the JSON documents in a checkpoint's folder have in common, which anybody may have written."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

from aoconvert.files import read_limited
from aoconvert.json_text import parse_json


def _check_date(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Date = Annotated[str, AfterValidator(_check_date)]
"""A date in ISO 8601, as text."""


class JsonModel(BaseModel):
    """Keys are only added, so readers let unknown ones pass. Docstrings and descriptions go into the JSON Schema."""

    model_config = ConfigDict(extra="allow", frozen=True)


M = TypeVar("M", bound=BaseModel)


def read_json_model(kind: type[M], path: Path, limit: int) -> M:
    """Read a document of at most ``limit`` bytes.

    Raises:
        OSError: there is none (``FileNotFoundError``), or it cannot be read.
        ValueError: it is not such a document.
    """
    return kind.model_validate(parse_json(read_limited(path, limit), constants=False))
