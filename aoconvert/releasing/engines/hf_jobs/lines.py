"""Documents in a log: a line of JSON each, in parts where it is long, so that what carries the log cannot cut it.

containerd cuts a line at 16 KiB by default (``max_container_log_line_size`` of its CRI plugin).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MOST = 8000
"""Characters of a line; all of them are ASCII."""
_PART = 3000
_PREFIXES = ('{"event":', '{"error":')


def to_lines(document: dict[str, Any]) -> Iterator[str]:
    """The lines of a document, without line breaks."""
    text = json.dumps(document)
    if len(text) <= MOST:
        yield text
        return
    parts = [text[at : at + _PART] for at in range(0, len(text), _PART)]
    for number, part in enumerate(parts):
        yield json.dumps({"event": "part", "number": number, "of": len(parts), "text": part})


class DocumentReader:
    """Finds documents in a log."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def take(self, line: str) -> dict[str, Any] | None:
        """The document that a line completes, an empty one for a part of one; ``None``: it is another line."""
        if not line.startswith(_PREFIXES):
            return None
        try:
            found = json.loads(line)
        except ValueError:
            return None
        if not isinstance(found, dict):
            return None
        if found.get("event") != "part":
            return found
        return self._join(found)

    def _join(self, part: dict[str, Any]) -> dict[str, Any] | None:
        number, of, text = part.get("number"), part.get("of"), part.get("text")
        if number == 0:
            self._parts = []
        if not isinstance(text, str) or number != len(self._parts):
            return None
        self._parts.append(text)
        if len(self._parts) != of:
            return {}
        return self.take("".join(self._parts))
