"""Secrets in text that is about to be published.

Forms of tokens: https://huggingface.co/docs/hub/security-tokens,
https://github.blog/engineering/platform-security/behind-githubs-new-authentication-token-formats/,
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html#identifiers-unique-ids, RFC 7468 for keys.
OpenAI's keys hold the word "OpenAI" in Base64, ``T3BlbkFJ``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from aoconvert.formats.registry import FORMATS
from aoconvert.hub.types import UploadFile

_KINDS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "a Hugging Face organisation token": rb"\bapi_org_[A-Za-z0-9]{30,}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "an OpenAI key": rb"\bsk-(?:[\w-]{10,}T3BlbkFJ[\w-]{10,}|(?:proj|svcacct|admin)-[\w-]{40,}|[A-Za-z0-9]{48}\b)",
    "an AWS access key": rb"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b",
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
# A zero byte is git's own sign of a file that is no text.
_HEAD = 8000
_MOST_TEXT = 200_000_000
_WEIGHTS = (*(suffix for entry in FORMATS.values() for suffix in entry.suffixes), ".gguf", ".onnx", ".h5", ".msgpack")


def find_secrets(files: Iterable[UploadFile], token: str | None) -> list[str]:
    """Where secrets stand in the text files among these, one line each; the secret itself is in no line.

    Args:
        files: what is to be sent.
        token: the Hub token in use, which may have any form.
    """
    problems = []
    for file in files:
        if file.path.endswith(_WEIGHTS) or file.size > _MOST_TEXT:
            continue
        content = b"".join(file.blocks())
        if b"\0" not in content[:_HEAD]:
            problems += [f"{file.path} line {line} holds {kind}" for line, kind in secrets_in(content, token)]
    return problems


def secrets_in(content: bytes, token: str | None) -> list[tuple[int, str]]:
    """Line and kind of each secret in a text, in order."""
    patterns = dict(_PATTERNS)
    if token is not None and len(token) >= 8:
        patterns = {"the Hub token in use": re.compile(re.escape(token.encode())), **patterns}
    found: dict[int, tuple[int, str]] = {}
    for kind, pattern in patterns.items():
        for match in pattern.finditer(content):
            found.setdefault(match.start(), (content.count(b"\n", 0, match.start()) + 1, kind))
    return [found[position] for position in sorted(found)]
