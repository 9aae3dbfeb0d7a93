"""Hold what a command prints against its schema in ``manifests/``: nothing missing, nothing that is not described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = Path(__file__).parents[2] / "manifests"


def check_document(name: str, value: Any) -> None:
    """Fail where a document does not fit its schema, or has a key that the schema does not name."""
    schema = json.loads((SCHEMAS / f"{name}.v1.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(value, _closed(schema))


def _closed(schema: Any) -> Any:
    """The schema with every object closed that names its keys."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    if "properties" in made and made.get("type") == "object":
        made["additionalProperties"] = False
    return made
