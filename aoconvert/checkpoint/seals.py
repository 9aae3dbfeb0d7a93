"""A text that aoconvert wrote ends with its own digest: by it everyone sees whether it was edited by hand since."""

from __future__ import annotations

import hashlib
import re

_SEAL = re.compile(rb"<!-- written by aoconvert; sha256 of all above: ([0-9a-f]{64}) -->\s*\Z")


def seal(text: str) -> str:
    """``text`` with a comment at its end that holds its SHA-256."""
    text = text.rstrip() + "\n\n"
    return f"{text}<!-- written by aoconvert; sha256 of all above: {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_sealed(content: bytes) -> bool:
    """Whether a text is one that :func:`seal` gave; how its lines end does not matter."""
    content = content.replace(b"\r\n", b"\n")
    found = _SEAL.search(content)
    return found is not None and hashlib.sha256(content[: found.start()]).hexdigest() == found[1].decode()
