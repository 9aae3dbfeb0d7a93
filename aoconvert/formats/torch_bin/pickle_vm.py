"""The state of a pickle reading: bytes, stack, marks, memo, and the inert containers that are built on the stack."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Protocol

from aoconvert.errors import UnsafePickleError

_FREE_CONTAINERS = 20_000
_BYTES_PER_CONTAINER = 8  # torch writes at least two strings or numbers for each
MAX_LINE = 4096  # bytes, of the text opcodes of protocol 0
_NESTED_TEXT = re.compile(r"\x80[\x00-\x05]|\(*[ci][\w.]+\n[\w.]+\n")


class PickledItems:
    """A list under construction. ``sealed`` once its content has been used: a change afterwards would be ambiguous."""

    __slots__ = ("sealed", "values")

    def __init__(self) -> None:
        self.values: list[object] = []
        self.sealed = False


class PickledPairs:
    """A dict under construction; ``ordered`` when it is an ``OrderedDict``."""

    __slots__ = ("ordered", "sealed", "values")

    def __init__(self, ordered: bool = False) -> None:
        self.values: dict[str | int, object] = {}
        self.ordered = ordered
        self.sealed = False


class Members:
    """A set or frozenset under construction, as it came."""

    __slots__ = ("sealed", "values")

    def __init__(self) -> None:
        self.values: list[object] = []
        self.sealed = False


class Actions(Protocol):
    """The meaning of names, calls and persistent ids; ``position`` is the byte of the opcode.

    Each raises UnsafePickleError for what it does not know.
    """

    def name(self, module: str, name: str, position: int) -> object:
        """What ``module.name`` stands for."""

    def persistent(self, pid: object, position: int) -> object:
        """The storage of a persistent id."""

    def call(self, func: object, args: tuple[object, ...], position: int) -> object:
        """The result of REDUCE."""

    def new(self, cls: object, args: tuple[object, ...], position: int) -> object:
        """The result of NEWOBJ."""

    def build(self, target: object, state: object, position: int) -> None:
        """BUILD: gives ``target`` its state."""


def refuse(position: int | None, what: str, *, hint: str | None = None) -> UnsafePickleError:
    """The error for something found at ``position``; to be raised."""
    where = "data.pkl" if position is None else f"data.pkl, byte {position}"
    return UnsafePickleError(f"{where}: {what}", position=position, hint=hint)


def show(text: str) -> str:
    """Text from the file, safe to print and short."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")[1:-1]


@dataclass
class Machine:
    """One reading of one pickle."""

    data: bytes
    actions: Actions
    protocol: int = 0
    position: int = 0  # the next byte
    start: int = 0  # of the opcode being read
    stack: list[object] = field(default_factory=list)
    marks: list[list[object]] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)
    containers: int = 0  # that were made

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self.position + count
        if end > len(self.data):
            left = len(self.data) - self.position
            raise refuse(self.start, f"{count:,} bytes announced, {left:,} are left")
        part = self.data[self.position : end]
        self.position = end
        return part

    def line(self) -> bytes:
        """The bytes up to the next newline."""
        end = self.data.find(b"\n", self.position, self.position + MAX_LINE)
        if end < 0:
            raise refuse(self.start, f"no end of line within {MAX_LINE} bytes")
        part = self.data[self.position : end]
        self.position = end + 1
        return part

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def contain(self, container: object) -> None:
        """Put a new list, dict or set on the stack; there may be so many in proportion to the pickle."""
        self.containers += 1
        if self.containers > _FREE_CONTAINERS + len(self.data) // _BYTES_PER_CONTAINER:
            raise refuse(self.start, f"more than {self.containers - 1:,} lists, dicts and sets")
        self.stack.append(container)

    def pop(self) -> object:
        """Take the top value; marks are in the way of deeper ones."""
        if not self.stack:
            raise refuse(self.start, "the stack is empty")
        return self.stack.pop()

    def top(self) -> object:
        """The top value, left in place."""
        if not self.stack:
            raise refuse(self.start, "the stack is empty")
        return self.stack[-1]

    def to_mark(self) -> list[object]:
        """All values since the last mark, taken with it."""
        if not self.marks:
            raise refuse(self.start, "no mark is open")
        values, self.stack = self.stack, self.marks.pop()
        return values

    def text(self, raw: bytes, encoding: str = "utf-8") -> str:
        """A string; one that itself starts a pickle is refused."""
        try:
            value = raw.decode(encoding)
            if not value.isascii():
                value.encode()  # raw-unicode-escape can make lone surrogates
        except UnicodeError as error:
            raise refuse(self.start, f"a string is not valid {encoding}") from error
        if _NESTED_TEXT.match(value):
            raise refuse(self.start, "a pickle nested in a string")
        return value

    def put(self, index: int) -> None:
        """Remember the top value."""
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        """Put a remembered value on the stack."""
        if index not in self.memo:
            raise refuse(self.start, f"memo {index} was never set")
        self.stack.append(self.memo[index])

    def tuple(self, count: int) -> None:
        """The top ``count`` values as a tuple."""
        if len(self.stack) < count:
            raise refuse(self.start, "the stack is empty")
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(values)
