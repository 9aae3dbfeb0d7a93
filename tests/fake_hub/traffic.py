"""What went over the wire, and what is to go wrong on it. Nothing here is imported beyond the standard library."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Request:
    """One request as it was answered; ``status`` 0 means that the connection ended without an answer."""

    server: str  # "hub", "store" or "cas"
    method: str
    path: str  # decoded, without the query
    range: str | None
    token: str | None
    status: int
    body_bytes: int  # sent; 0 for HEAD
    query: str = ""  # as it came
    received: int = 0  # bytes of the request's body that were read
    lost: int = 0  # the status of an answer that was made and then not sent

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Fault:
    """What goes wrong with requests whose decoded path matches.

    ``status`` answers with that status; the request's body is read and nothing is done. ``cut_after`` sends that many
    bytes of the body and closes. ``reset`` ends the connection with a TCP reset, before the request's body is read, or
    after ``cut_after`` bytes of the answer. ``reset_after`` reads that many bytes of the request's body and resets.
    ``lose_answer`` does the work and resets instead of answering. ``delay`` waits first; with nothing else the answer
    is the usual one.
    """

    pattern: str  # re.search on the decoded path
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    reset: bool = False
    cut_after: int | None = None
    method: str | None = None
    times: int = 1_000_000
    server: str | None = None  # "hub", "store" or "cas"; None: any
    skip: int = 0  # so many matching requests pass first
    delay: float = 0.0  # seconds
    reset_after: int | None = None
    lose_answer: bool = False

    def matches(self, server: str, method: str, path: str) -> bool:
        return (
            self.server in (None, server)
            and self.method in (None, method)
            and self.times > 0
            and re.search(self.pattern, path) is not None
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "headers": dict(self.headers), "body": base64.b64encode(self.body).decode()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Fault:
        return cls(**{**raw, "body": base64.b64decode(raw["body"])})


class Traffic:
    """The log, the faults that are left, and errors of the server itself. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._log: list[Request] = []
        self._faults: list[Fault] = []
        self._errors: list[str] = []

    def record(self, request: Request) -> None:
        with self._lock:
            self._log.append(request)

    def log(self) -> list[Request]:
        with self._lock:
            return list(self._log)

    def add_error(self, text: str) -> None:
        with self._lock:
            self._errors.append(text)

    def errors(self) -> list[str]:
        with self._lock:
            return list(self._errors)

    def add_faults(self, faults: Iterable[Fault]) -> None:
        with self._lock:
            self._faults += [replace(fault) for fault in faults]

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def take_fault(self, server: str, method: str, path: str) -> Fault | None:
        """The first fault with times left that matches, which uses up one of them."""
        with self._lock:
            for fault in self._faults:
                if not fault.matches(server, method, path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return replace(fault)
        return None


def total_bytes(requests: Iterable[Request]) -> int:
    """Body bytes that these requests were answered with."""
    return sum(request.body_bytes for request in requests)
