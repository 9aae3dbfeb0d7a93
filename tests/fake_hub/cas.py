"""A Xet content-addressed store on loopback: real HTTP, real files on disk, driven by the unmodified hf_xet wheel.

Endpoints, from "CAS API", "Upload Protocol", "Download Protocol" and "File Reconstruction" of the Xet protocol
specification (huggingface.co/docs/xet), from openapi/cas.openapi.yaml and cas_types of huggingface/xet-core for
version 2 of the reconstruction and of the shard upload, and from what hf_xet 1.8.0 asked::

    POST /v1/xorbs/default/<hash>     a xorb -> {was_inserted}; 400 where the content has another hash
    POST /v2/shards                   a shard -> lines of JSON, the last {type: result}; 400 where it is not true
    GET  /v2/reconstructions/<hash>   with or without Range -> which chunks of which xorbs, and where to fetch them
    GET  /fetch/<hash>?range=&key=    bytes of a xorb, without a token; the key signs the one range it may be asked for
    POST /v1/telemetry                taken and dropped

``POST /v1/xorb-grants/…`` (uploads straight to the object store) is answered 404, after which hf_xet 1.8.0 uploads to
``/v1/xorbs``; ``GET /v1/chunks/…`` (what other people's uploads hold already) is answered 404, "not tracked", so a
client knows only of its own earlier uploads.

A token is ``xet-read-…`` or ``xet-write-…``; any other gets 401, and 403 a read token that uploads. What it does not
prove: that the real store answers like this in every case; grants; several ranges in one fetch (each has an address of
its own); tokens that expire or are for one repo, unless a fault says 401 or 403; TLS; speed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_hub.traffic import Fault, Request, Traffic
from fake_hub.wire import Exchange, Failure, Routes, Server
from fake_hub.xet_store import Part, Refused, XetStore


class Cas:
    """The server and what it keeps.

    Attributes:
        take_fault: asked with method and path at every request for what to do instead of answering.
        record: called with every request as it was answered.
        endpoint: the address, once it was started.
    """

    endpoint: str

    def __init__(self, root: Path) -> None:
        self.store = XetStore(root)
        self.take_fault: Callable[[str, str], Fault | None] | None = None
        self.record: Callable[[Request], None] | None = None
        self._secret = secrets.token_bytes(16)
        self._server: Server | None = None

    def start(self) -> None:
        routes = Routes()
        routes.add("POST", "v1/xorbs/default/{name}")(self._post_xorb)
        routes.add("POST", "v2/shards")(self._post_shard)
        routes.add("GET", "v2/reconstructions/{name}")(self._get_reconstruction)
        routes.add("GET", "fetch/{xorb}")(self._get_bytes)
        routes.add("POST", "v1/telemetry")(self._post_telemetry)
        self._server = Server("cas", routes.respond, _Calls(self))
        self.endpoint = self._server.address
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def lookup(self, sha256: str) -> tuple[str, int] | None:
        """The Xet hash and the size of an uploaded file; ``None`` where there is none with this content."""
        return self.store.lookup(sha256)

    def read(self, xet_hash: str) -> bytes:
        """The whole content of an uploaded file. Raises KeyError."""
        return self.store.read(xet_hash)

    # Endpoints

    def _post_xorb(self, exchange: Exchange, name: str) -> None:
        _allow(exchange, write=True)
        body = exchange.body()
        exchange.answer({"was_inserted": _keep(lambda: self.store.put_xorb(name, body))})

    def _post_shard(self, exchange: Exchange) -> None:
        _allow(exchange, write=True)
        body = exchange.body()
        _keep(lambda: self.store.put_shard(body))
        exchange.send(200, b'{"type": "result"}\n', {"Content-Type": "application/x-ndjson"})

    def _post_telemetry(self, exchange: Exchange) -> None:
        _allow(exchange)
        exchange.answer({})

    def _get_reconstruction(self, exchange: Exchange, name: str) -> None:
        _allow(exchange)
        parts = self.store.parts(name)
        if parts is None:
            raise Failure(404, None, f"no file {name}")
        size = sum(part.size for part in parts)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", exchange.headers.get("Range") or f"bytes=0-{max(size - 1, 0)}")
        if wanted is None or (size and int(wanted[1]) >= size):
            raise Failure(416, None, "no such range")
        exchange.answer(self._reconstruction(parts, int(wanted[1]), min(int(wanted[2]) + 1, size)))

    def _get_bytes(self, exchange: Exchange, xorb: str) -> None:
        span = exchange.param("range") or ""
        signed = hmac.compare_digest(exchange.param("key") or "", self._sign(xorb, span))
        if not signed or exchange.headers.get("Range") != f"bytes={span}":
            raise Failure(403, None, "the address is not signed for this range")
        exchange.send_content(self.store.xorb(xorb), {"Content-Type": "application/octet-stream"})

    # The way back to a file

    def _reconstruction(self, parts: list[Part], first: int, end: int) -> dict[str, Any]:
        """The answer for the bytes ``[first, end)`` of a file, which may begin and end within a chunk."""
        offset, wanted = self._cut(parts, first, end)
        return {
            "offset_into_first_range": offset,
            "terms": [
                {"hash": part.xorb, "unpacked_length": part.size, "range": {"start": part.first, "end": part.end}}
                for part in wanted
            ],
            "xorbs": {
                xorb: [self._fetch(xorb, *run) for run in _runs([part for part in wanted if part.xorb == xorb])]
                for xorb in {part.xorb for part in wanted}
            },
        }

    def _cut(self, parts: list[Part], first: int, end: int) -> tuple[int, list[Part]]:
        """The parts without the chunks outside of ``[first, end)``, and where in them ``first`` is."""
        wanted: list[Part] = []
        offset = position = 0
        for part in parts:
            kept: list[tuple[int, int]] = []
            for index, size in enumerate(self.store.sizes(part), part.first):
                if position < end and position + size > first:
                    if not wanted and not kept:
                        offset = first - position
                    kept.append((index, size))
                position += size
            if kept:
                wanted.append(Part(part.xorb, kept[0][0], kept[-1][0] + 1, sum(size for _, size in kept)))
        return offset, wanted

    def _fetch(self, xorb: str, first: int, end: int) -> dict[str, Any]:
        start, last = self.store.byte_range(xorb, first, end)
        span = f"{start}-{last}"
        ranges = [{"chunks": {"start": first, "end": end}, "bytes": {"start": start, "end": last}}]
        return {"url": f"{self.endpoint}/fetch/{xorb}?range={span}&key={self._sign(xorb, span)}", "ranges": ranges}

    def _sign(self, xorb: str, span: str) -> str:
        return hmac.new(self._secret, f"{xorb} {span}".encode(), hashlib.sha256).hexdigest()


class _Calls(Traffic):
    """The log and the faults of whoever uses the store."""

    def __init__(self, cas: Cas) -> None:
        super().__init__()
        self._cas = cas

    def take_fault(self, server: str, method: str, path: str) -> Fault | None:
        return self._cas.take_fault(method, path) if self._cas.take_fault is not None else None

    def record(self, request: Request) -> None:
        if self._cas.record is not None:
            self._cas.record(request)

    def add_error(self, text: str) -> None:
        sys.stderr.write(text)


def _allow(exchange: Exchange, *, write: bool = False) -> None:
    token = exchange.token or ""
    if not token.startswith(("xet-read-", "xet-write-")):
        raise Failure(401, None, "no valid token")
    if write and not token.startswith("xet-write-"):
        raise Failure(403, None, "the token does not allow to write")


def _keep(put: Callable[[], bool]) -> bool:
    try:
        return put()
    except Refused as refused:
        raise Failure(400, None, str(refused)) from refused


def _runs(parts: list[Part]) -> list[tuple[int, int]]:
    """The chunks of these parts as runs that neither overlap nor touch."""
    runs: list[tuple[int, int]] = []
    for first, end in sorted((part.first, part.end) for part in parts):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        else:
            runs.append((first, end))
    return runs
