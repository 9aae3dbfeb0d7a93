"""JSON that comes from outside: what Python takes, less what nobody writes and much that follows could not bear."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

CONFIG_BYTES = 16 << 20
"""Most bytes of a config; the largest published ones, with labels for 20,000 classes, have 2 MB."""

INDEX_BYTES = 128 << 20
"""Most bytes of an index of shards; one of 100,000 tensors has 10 MB."""

_MAX_DEPTH = 100
_MAX_KEY = 1 << 17
_MAX_DIGITS = 100  # a tokenizer's "no limit" has 31
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_WINDOW = 1 << 20  # bytes
_LONGEST_WORD = 16  # characters of a number's or constant's end that can be missing, or of an escape
_SPACE = re.compile(r"[ \t\n\r]*")


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


class JsonStream:
    """A JSON text that is read value by value; neither its characters nor its values are ever held whole.

    Args:
        raw: UTF-8.
        constants: as for ``parse_json``.

    Raises:
        ValueError: by every method, as ``parse_json``.
    """

    def __init__(self, raw: bytes | bytearray, *, constants: bool = True) -> None:
        self._raw = memoryview(raw)
        self._decoded = 0  # bytes
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        decoder = json.JSONDecoder(parse_int=_integer, parse_constant=None if constants else _no_number)
        self._scan = decoder.raw_decode
        self._text, self._at = "", 0
        self._line = 1  # in which the text begins

    def peek(self) -> str:
        """The first character of what comes next; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches anything
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next; the value of each is to be read before the next one."""
        for _ in self._parts("{", "}"):
            if self.peek() != '"':
                raise self._wrong(self._at)
            key = self.value()
            _check_containers({key: None})
            self._take(":")
            yield key

    def items(self) -> Iterator[None]:
        """Once for each item of the list that comes next; it is to be read before the next one."""
        return self._parts("[", "]")

    def value(self) -> Any:
        """What comes next, whole."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self._text) - _LONGEST_WORD or error.msg.startswith("Unterminated")
                if not (cut_off and self._more()):
                    raise self._wrong(error.pos) from error
            except RecursionError as error:
                raise ValueError("not usable JSON (nested too deeply)") from error
            else:
                if end < len(self._text) or not self._more():  # a number could go on
                    break
        start, self._at = self._at, end
        if end - start > _MAX_KEY or self._text.count("[", start, end) + self._text.count("{", start, end) > _MAX_DEPTH:
            _check_containers(value)
        if _SURROGATE.search(self._text, start, end):
            _check_unicode(value)
        return value

    def finish(self) -> None:
        """Nothing may come any more."""
        if self.peek():
            raise self._wrong(self._at)

    def _parts(self, first: str, last: str) -> Iterator[None]:
        self._take(first)
        if self.peek() == last:
            return self._take(last)
        while True:
            yield
            if self.peek() == last:
                return self._take(last)
            self._take(",")

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self._wrong(self._at)
        self._at += 1

    def _more(self) -> bool:
        """Decode what follows, twice as much each time that it is not enough; what was read is let go."""
        size = max(_WINDOW, len(self._text) - self._at)
        part = self._raw[self._decoded : self._decoded + size]
        if not part:
            return False
        self._decoded += len(part)
        self._line += self._text.count("\n", 0, self._at)
        try:
            more = self._decode(part, final=self._decoded == len(self._raw))
        except UnicodeDecodeError as error:
            place = self._decoded - len(error.object) + error.start
            raise ValueError(f"not UTF-8 text (byte {place})") from error
        self._text, self._at = self._text[self._at :] + more, 0
        return True

    def _wrong(self, place: int) -> ValueError:
        return ValueError(f"not valid JSON (line {self._line + self._text.count(chr(10), 0, place)})")


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
