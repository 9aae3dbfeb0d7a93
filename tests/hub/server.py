"""A Hugging Face Hub on loopback: real HTTP, real files on disk, driven by the unmodified huggingface_hub client.

``LoopbackHub`` runs two servers in threads of this process: the Hub, and beside it, on another port and thus another
origin, the store that LFS files are redirected to, as the real Hub does. Every request is logged with the body bytes
that were sent. Faults (a status, a reset, a body cut short) can be put on any path.

What it does not prove: that the real Hub answers like this in every case (the answers follow its documented API and
what the client reads of them); anything about Xet, TLS, redirects of renamed repos, pages of long listings, rate limits
by themselves, CDN signatures that expire, or speed. The client treats a bare 401 as a missing repo only under
``https://``, so this server names the error in ``X-Error-Code`` where the real one may not. That the files of a gated
repo can be listed without access is an assumption. Only downloads are served for now.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.state import Entry, HubState


@dataclass(frozen=True)
class Request:
    """One request as it was answered; ``status`` 0 means that the connection was reset."""

    server: str  # "hub" or "store"
    method: str
    path: str  # decoded, without the query
    range: str | None
    token: str | None
    status: int
    body_bytes: int  # sent; 0 for HEAD


@dataclass
class Fault:
    """What to do instead of answering, for requests whose decoded path matches.

    ``status`` answers with that status. ``cut_after`` sends that many bytes of the real body and closes. ``reset`` ends
    the connection with a TCP reset, at once or after ``cut_after``.
    """

    pattern: str  # re.search on the decoded path
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    reset: bool = False
    cut_after: int | None = None
    method: str | None = None
    times: int = 1_000_000


class LoopbackHub:
    """The two servers, their state, log and faults. Use as a context manager."""

    def __init__(self, root: Path) -> None:
        self.state = HubState(root)
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._servers = [_Server(self, name) for name in ("hub", "store")]

    @property
    def endpoint(self) -> str:
        return self._address(0)

    @property
    def store(self) -> str:
        return self._address(1)

    def _address(self, number: int) -> str:
        return f"http://127.0.0.1:{self._servers[number].server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def record(self, request: Request) -> None:
        with self._lock:
            self.log.append(request)

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The first fault with times left that matches, which uses up one of them."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (None, method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def requests(self, pattern: str, *, method: str | None = None, server: str | None = None) -> list[Request]:
        """Logged requests whose path matches."""
        with self._lock:
            return [
                entry
                for entry in self.log
                if re.search(pattern, entry.path) and method in (None, entry.method) and server in (None, entry.server)
            ]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: LoopbackHub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.name = name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests; anything else is a bug of this server and is printed."""
        import sys

        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # Without it, the answer's head and body leave as two packets and wait for each other's acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    # The sorting of requests

    def _answer(self) -> None:
        self.raw_path, _, self.query = self.path.partition("?")
        self.clean_path = unquote(self.raw_path)
        self.fault = self.server.hub.take_fault(self.command, self.clean_path)
        if self.fault is not None and self.fault.reset and self.fault.cut_after is None:
            self._record(0, 0)
            self._close(hard=True)
        elif self.fault is not None and self.fault.status is not None:
            self._send(self.fault.status, self.fault.body, dict(self.fault.headers))
        elif self.server.name == "store":
            self._get_stored()
        else:
            self._get_hub()

    def _get_hub(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.raw_path).path.strip("/").split("/")]
        match parts:
            case ["api", "models", user, name]:
                self._model_info(f"{user}/{name}", "main")
            case ["api", "models", user, name, "revision", revision]:
                self._model_info(f"{user}/{name}", revision)
            case ["api", "models", user, name, "tree", revision, *folder]:
                self._tree(f"{user}/{name}", revision, "/".join(folder))
            case [user, name, "resolve", revision, *path]:
                self._resolve(f"{user}/{name}", revision, "/".join(path))
            case _:
                self._error(404, None, f"no such endpoint: {self.clean_path}")

    # Endpoints

    def _model_info(self, repo_id: str, revision: str) -> None:
        found = self._open(repo_id, revision)
        if found is None:
            return
        sha, entries = found
        blobs = "blobs" in parse_qs(self.query)
        settings = self.server.hub.state.settings(repo_id)
        assert settings is not None
        siblings: list[dict[str, Any]] = []
        for path, entry in entries.items():
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": entry.size, "blobId": entry.oid[:40]}
                if entry.lfs:
                    sibling["lfs"] = {"sha256": entry.oid, "size": entry.size, "pointerSize": 134}
            siblings.append(sibling)
        self._json(
            {
                "_id": "0" * 24,
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "private": settings.private,
                "gated": "manual" if settings.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def _tree(self, repo_id: str, revision: str, folder: str) -> None:
        found = self._open(repo_id, revision)
        if found is None:
            return
        items: list[dict[str, Any]] = []
        for path, entry in found[1].items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            item: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid[:40]}
            if entry.lfs:
                item["lfs"] = {"oid": entry.oid, "size": entry.size, "pointerSize": 134}
            items.append(item)
        self._json(items)

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._open(repo_id, revision, content=True)
        if found is None:
            return
        sha, entries = found
        entry = entries.get(path)
        if entry is None:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            return
        head = {"X-Repo-Commit": sha, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"}
        if entry.lfs:
            hub = self.server.hub
            head |= {"X-Linked-ETag": f'"{entry.oid}"', "X-Linked-Size": str(entry.size)}
            self._send(302, b"", {**head, "Location": f"{hub.store}/lfs/{entry.oid}"})
        else:
            self._send_file(entry, head)

    def _get_stored(self) -> None:
        oid = self.clean_path.removeprefix("/lfs/")
        file = self.server.hub.state.blob(oid)
        if "/" in oid or not file.is_file():
            self._error(404, None, "no such object")
        else:
            self._send_file(Entry(oid, file.stat().st_size, True), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    # Access

    def _open(self, repo_id: str, revision: str, *, content: bool = False) -> tuple[str, dict[str, Entry]] | None:
        """The commit and its files; where that may not be, answer the error and return ``None``."""
        state = self.server.hub.state
        token = self._token()
        user = state.tokens.get(token) if token is not None else None
        if token is not None and user is None:
            self._error(401, None, "Invalid credentials in Authorization header")
            return None
        settings = state.settings(repo_id)
        allowed = settings is not None and (user in settings.readers or not (settings.private or settings.gated))
        if settings is None or (settings.private and not allowed):
            # The real Hub does not tell a stranger whether a private repo exists.
            self._error(401 if user is None else 404, "RepoNotFound", "Repository not found")
            return None
        if content and not allowed:
            self._error(401 if user is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted")
            return None
        sha = state.resolve(repo_id, revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, state.entries(repo_id, sha)

    def _token(self) -> str | None:
        value = self.headers.get("Authorization")
        return value.removeprefix("Bearer ") if value else None

    # Answers

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, message: str, more: Mapping[str, str] | None = None) -> None:
        head = {"X-Error-Message": message, "Content-Type": "application/json", **(more or {})}
        if code is not None:
            head["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), head)

    def _send_file(self, entry: Entry, head: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, self.server.hub.state.blob(entry.oid).read_bytes(), head)
            return
        first = int(wanted[1])
        last = min(int(wanted[2]) if wanted[2] else entry.size - 1, entry.size - 1)
        if first > last:
            self._send(416, b"", {**head, "Content-Range": f"bytes */{entry.size}"})
            return
        with self.server.hub.state.blob(entry.oid).open("rb") as stream:
            stream.seek(first)
            body = stream.read(last - first + 1)
        self._send(206, body, {**head, "Content-Range": f"bytes {first}-{last}/{entry.size}"})

    def _send(self, status: int, body: bytes, head: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**head, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        cut = self.fault.cut_after if self.fault is not None and self.command != "HEAD" else None
        sent = b"" if self.command == "HEAD" else body[:cut]
        self._record(status, len(sent))
        self.wfile.write(sent)
        if self.fault is not None and cut is not None:
            self._close(hard=self.fault.reset)

    def _close(self, *, hard: bool) -> None:
        """End the connection before its time: with a TCP reset, or in good order."""
        self.wfile.flush()
        if hard:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close() if hard else self.connection.shutdown(socket.SHUT_RDWR)

    def _record(self, status: int, body_bytes: int) -> None:
        self.server.hub.record(
            Request(
                self.server.name,
                self.command,
                self.clean_path,
                self.headers.get("Range"),
                self._token(),
                status,
                body_bytes,
            )
        )


def total_bytes(requests: Iterable[Request]) -> int:
    """Body bytes that these requests were answered with."""
    return sum(request.body_bytes for request in requests)
