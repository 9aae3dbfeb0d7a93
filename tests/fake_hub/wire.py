"""One HTTP exchange of the loopback servers: the request's body, the answer, and the faults in between."""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, unquote

from fake_hub.state import HubState
from fake_hub.traffic import Fault, Request, Traffic

PIECE = 1 << 20


class Cas(Protocol):
    """What the Hub asks of the Xet store."""

    endpoint: str

    def lookup(self, sha256: str) -> tuple[str, int] | None: ...
    def read(self, xet_hash: str) -> bytes: ...


@dataclass
class Site:
    """What handlers know: the state on disk, the addresses of the servers, and how to get at the CAS."""

    state: HubState
    hub: str
    store: str
    cas: Callable[[], Cas]


@dataclass
class Failure(Exception):
    """Answer with an error: a status, the X-Error-Code that the client knows, and a message for people."""

    status: int
    code: str | None
    message: str
    headers: Mapping[str, str] | None = None
    more: Mapping[str, Any] | None = None  # further fields of the JSON body


class Gone(Exception):
    """The connection ended before the request did."""


class Server(ThreadingHTTPServer):
    """A server on a free loopback port. Where handlers need a ``site``, it is set before the start."""

    daemon_threads = True
    request_queue_size = 64
    site: Site

    def __init__(self, name: str, respond: Callable[[Exchange], None], traffic: Traffic) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.name = name
        self.respond = respond
        self.traffic = traffic

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests; anything else is a bug of this server."""
        if not isinstance(sys.exception(), (ConnectionError, Gone)):
            self.traffic.add_error(traceback.format_exc())


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer. Handlers get it, and raise ``Failure`` or answer once."""

    server: Server
    protocol_version = "HTTP/1.1"
    # Without it, the answer's head and body leave as two packets and wait for each other's acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.raw_path, _, self.query = self.path.partition("?")
        self.clean_path = unquote(self.raw_path)
        self.params = parse_qs(self.query, keep_blank_values=True)
        self.length = int(self.headers.get("Content-Length") or 0)
        self.received = 0
        self.fault = self.server.traffic.take_fault(self.server.name, self.command, self.clean_path)
        try:
            if self.fault is not None and self._before(self.fault):
                return
            try:
                self.server.respond(self)
            except Failure as failure:
                self.fail(failure)
        except Gone:
            self._record(0, 0)
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _before(self, fault: Fault) -> bool:
        """What goes wrong before any work; whether the request is done with."""
        time.sleep(fault.delay)
        if fault.reset_after is not None:
            for _ in self.pieces(min(fault.reset_after, self.length)):
                pass
            self._record(0, 0)
            self._close(hard=True)
        elif fault.reset and fault.cut_after is None:
            self._record(0, 0)
            self._close(hard=True)
        elif fault.status is not None:
            self.send(fault.status, fault.body, dict(fault.headers))
        else:
            return False
        return True

    # The request

    @property
    def site(self) -> Site:
        return self.server.site

    def pieces(self, count: int | None = None) -> Iterator[bytes]:
        """The request's body, or the next ``count`` bytes of it. Raises Gone where it ends too early."""
        end = self.length if count is None else self.received + count
        while self.received < end:
            piece = self.rfile.read1(min(PIECE, end - self.received))
            if not piece:
                raise Gone
            self.received += len(piece)
            yield piece

    def body(self) -> bytes:
        return b"".join(self.pieces())

    def json_body(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body() or b"{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Failure(400, None, "Invalid JSON body")
        return value

    def param(self, name: str) -> str | None:
        return self.params[name][0] if name in self.params else None

    def flag(self, name: str) -> bool:
        return self.param(name) in ("1", "true", "True", "")

    @property
    def token(self) -> str | None:
        value = self.headers.get("Authorization")
        return value.removeprefix("Bearer ") if value else None

    # The answer

    def answer(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def page(self, items: list[Any], size: int) -> None:
        """One page of a listing, and the address of the next in the Link header."""
        start = int(self.param("cursor") or 0)
        limit = min(size, int(self.param("limit") or size))
        headers = {}
        if start + limit < len(items):
            others = "&".join(f"{quote(k)}={quote(v)}" for k, vs in self.params.items() if k != "cursor" for v in vs)
            following = f"{self.site.hub}{self.raw_path}?{others}{'&' if others else ''}cursor={start + limit}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.answer(items[start : start + limit], headers=headers)

    def fail(self, failure: Failure) -> None:
        head = {"X-Error-Message": failure.message, "Content-Type": "application/json", **(failure.headers or {})}
        if failure.code is not None:
            head["X-Error-Code"] = failure.code
        self.send(failure.status, json.dumps({"error": failure.message, **(failure.more or {})}).encode(), head)

    def send_content(self, content: Path | bytes, head: dict[str, str]) -> None:
        """A file, or the part that the Range header asks for."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        head = {**head, "Accept-Ranges": "bytes"}
        if wanted is None:
            self.send(200, _part(content, 0, size), head)
            return
        first = int(wanted[1])
        last = min(int(wanted[2]) if wanted[2] else size - 1, size - 1)
        if first > last:
            self.send(416, b"", {**head, "Content-Range": f"bytes */{size}"})
        else:
            self.send(206, _part(content, first, last + 1), {**head, "Content-Range": f"bytes {first}-{last}/{size}"})

    def send(self, status: int, body: bytes, head: Mapping[str, str]) -> None:
        for _ in self.pieces():  # what the handler had no use for: the next request begins behind it
            pass
        fault = self.fault
        if fault is not None and fault.lose_answer:
            self._record(0, 0, lost=status)
            self._close(hard=True)
            return
        self.send_response(status)
        for name, value in {**head, "Content-Length": str(len(body))}.items():
            self.send_header(name, " ".join(value.splitlines()))
        self.end_headers()
        cut = fault.cut_after if fault is not None and self.command != "HEAD" else None
        sent = b"" if self.command == "HEAD" else body[:cut]
        self._record(status, len(sent))
        self.wfile.write(sent)
        if fault is not None and cut is not None:
            self._close(hard=fault.reset)

    def _close(self, *, hard: bool) -> None:
        """End the connection before its time: with a TCP reset, or in good order."""
        self.wfile.flush()
        if hard:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close() if hard else self.connection.shutdown(socket.SHUT_RDWR)

    def _record(self, status: int, body_bytes: int, *, lost: int = 0) -> None:
        request = Request(
            server=self.server.name,
            method=self.command,
            path=self.clean_path,
            range=self.headers.get("Range"),
            token=self.token,
            status=status,
            body_bytes=body_bytes,
            query=self.query,
            received=self.received,
            lost=lost,
        )
        self.server.traffic.record(request)


def _part(content: Path | bytes, first: int, end: int) -> bytes:
    if isinstance(content, bytes):
        return content[first:end]
    with content.open("rb") as stream:
        stream.seek(first)
        return stream.read(end - first)


Handler = Callable[..., None]


class Routes:
    """Handlers by method and path. ``{name}`` stands for one segment, ``{name...}`` for the rest."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, list[str], Handler]] = []

    def add(self, methods: str, *templates: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            for template in templates:
                self._routes += [(method, template.split("/"), handler) for method in methods.split()]
            return handler

        return register

    def extend(self, other: Routes) -> None:
        self._routes += other._routes

    def respond(self, exchange: Exchange) -> None:
        """Call the first handler that matches. HEAD is answered as GET. Raises Failure where there is none."""
        segments = [unquote(part) for part in exchange.raw_path.strip("/").split("/")]
        method = "GET" if exchange.command == "HEAD" else exchange.command
        known = False
        for wanted, template, handler in self._routes:
            found = _match(template, segments)
            if found is None:
                continue
            known = True
            if wanted == method:
                try:
                    handler(exchange, **found)
                except (Failure, Gone, ConnectionError):
                    raise
                except Exception:
                    exchange.server.traffic.add_error(traceback.format_exc())
                    raise Failure(500, None, "a bug of the loopback Hub") from None
                return
        if known:
            raise Failure(405, None, f"{exchange.command} is not allowed here")
        raise Failure(404, None, f"no such endpoint: {exchange.clean_path}")


def _match(template: list[str], segments: list[str]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for number, part in enumerate(template):
        if part.endswith("...}"):
            if number >= len(segments):
                return None
            return {**found, part[1:-4]: "/".join(segments[number:])}
        if number >= len(segments):
            return None
        if part.startswith("{"):
            found[part[1:-1]] = segments[number]
        elif part != segments[number]:
            return None
    return found if len(template) == len(segments) else None
