"""JSON that comes from outside: what Python takes, less what nobody writes and much that follows could not bear."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

CONFIG_BYTES = 16 << 20
"""Most bytes of a config; the largest published ones, with labels for 20,000 classes, have 2 MB."""

INDEX_BYTES = 128 << 20
"""Most bytes of an index of shards; one of 100,000 tensors has 10 MB."""

_MAX_DEPTH = 100
_MAX_KEY = 1 << 17
_MAX_DIGITS = 100  # a tokenizer's "no limit" has 31
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes, *, constants: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        raw: UTF-8.
        constants: take ``NaN`` and ``Infinity``, too, which Python writes into configs.

    Raises:
        ValueError: what is wrong, in a few words that follow "is": no UTF-8, no JSON, or of absurd depth or length.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from error
    try:
        value = json.loads(text, parse_int=_integer, parse_constant=None if constants else _no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (line {error.lineno})") from error
    except RecursionError as error:
        raise ValueError("not usable JSON (nested too deeply)") from error
    _check_containers(value)
    if _SURROGATE.search(text):
        _check_unicode(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"not usable JSON (a number of {len(digits):,} digits)")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON ({name})")


def _check_containers(value: Any) -> None:
    """Depth and length of keys; level by level, as a recursion would need the depth it checks."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            if isinstance(container, dict) and any(len(key) > _MAX_KEY for key in container):
                raise ValueError(f"not usable JSON (a key of more than {_MAX_KEY:,} characters)")
            values = container.values() if isinstance(container, dict) else container
            below += [part for part in values if isinstance(part, (dict, list))]
        if not below:
            return
        level = below
    raise ValueError("not usable JSON (nested too deeply)")


def _check_unicode(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("not usable JSON (half a surrogate pair)") from error
