"""The store of LFS objects: another origin than the Hub, which knows no tokens but signed addresses.

As S3, it wants to know the length of what is uploaded, and answers errors in XML. What arrives is checked against the
SHA-256 in its name.
"""

from __future__ import annotations

import hashlib
import hmac
import shutil
import time
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import escape

from fake_hub.state import HubState
from fake_hub.wire import Exchange, Routes, Site

LIFETIME = 3600  # seconds that a signed address is good for

routes = Routes()


def signature(state: HubState, method: str, path: str, expires: int) -> str:
    key = (state.root / "secret").read_bytes()
    return hmac.new(key, f"{method} {path} {expires}".encode(), hashlib.sha256).hexdigest()


def address(site: Site, path: str, method: str = "GET", server: str | None = None) -> str:
    """A signed address; of the store, if no other server is named."""
    expires = int(time.time()) + LIFETIME
    signed = f"expires={expires}&signature={signature(site.state, method, path, expires)}"
    return f"{server or site.store}{quote(path)}?{signed}"


def is_signed(exchange: Exchange, method: str) -> bool:
    try:
        expires = int(exchange.param("expires") or 0)
    except ValueError:
        return False
    wanted = signature(exchange.site.state, method, exchange.clean_path, expires)
    return expires > time.time() and hmac.compare_digest(wanted, exchange.param("signature") or "")


def _fail(exchange: Exchange, status: int, code: str, message: str) -> None:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>'
    )
    exchange.send(status, body.encode(), {"Content-Type": "application/xml"})


@routes.add("GET", "lfs/{oid}")
def get_object(exchange: Exchange, oid: str) -> None:
    if not is_signed(exchange, "GET"):
        _fail(exchange, 403, "SignatureDoesNotMatch", "The address is not signed, or no longer good.")
        return
    state = exchange.site.state
    content: Path | bytes = state.blob(oid)
    if not state.blob(oid).is_file():
        # It came by Xet: the Hub rebuilds it for clients that do not speak Xet.
        known = exchange.site.cas().lookup(oid) if state.xet else None
        if known is None:
            _fail(exchange, 404, "NoSuchKey", "The specified key does not exist.")
            return
        content = exchange.site.cas().read(known[0])
    exchange.send_content(content, {"ETag": f'"{oid}"'})


@routes.add("PUT", "upload/{kind}/{user}/{name}/{oid}")
def put_object(exchange: Exchange, kind: str, user: str, name: str, oid: str) -> None:
    """A whole object, for one repo."""
    if _refuses_put(exchange):
        return
    state = exchange.site.state
    partial = state.disk.scratch(state.blob(oid))
    try:
        digest = hashlib.sha256()
        with partial.open("wb") as stream:
            for piece in exchange.pieces():
                digest.update(piece)
                stream.write(piece)
        if digest.hexdigest() != oid:
            _fail(exchange, 400, "BadDigest", "The SHA-256 of what came is not the one that was announced.")
            return
        partial.replace(state.blob(oid))
    finally:
        partial.unlink(missing_ok=True)
    key = f"{user}/{name}" if kind == "models" else f"{kind}/{user}/{name}"
    state.add_object(key, oid, exchange.length)
    exchange.send(200, b"", {"ETag": f'"{oid}"'})


@routes.add("PUT", "parts/{upload}/{number}")
def put_part(exchange: Exchange, upload: str, number: str) -> None:
    """One part of an object; ``join`` makes the object of them."""
    if _refuses_put(exchange):
        return
    content = exchange.body()
    file = parts_folder(exchange.site.state, upload) / number
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = exchange.site.state.disk.scratch(file)
    partial.write_bytes(content)
    partial.replace(file)
    exchange.send(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})


def _refuses_put(exchange: Exchange) -> bool:
    if not is_signed(exchange, "PUT"):
        _fail(exchange, 403, "SignatureDoesNotMatch", "The address is not signed, or no longer good.")
    elif exchange.headers.get("Content-Length") is None:
        exchange.close_connection = True
        _fail(exchange, 501, "NotImplemented", "A header you provided implies functionality that is not implemented.")
    else:
        return False
    return True


def parts_folder(state: HubState, upload: str) -> Path:
    return state.root / "parts" / upload


def join(state: HubState, key: str, oid: str, upload: str, etags: list[str]) -> str | None:
    """Make an object of its parts. Returns what is wrong with them, if something is."""
    folder = parts_folder(state, upload)
    files = [folder / f"{number:05}" for number in range(1, len(etags) + 1)]
    partial = state.disk.scratch(state.blob(oid))
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as stream:
            for file, etag in zip(files, etags, strict=True):
                content = file.read_bytes() if file.is_file() else b""
                if hashlib.md5(content).hexdigest() != etag.strip('"'):
                    return f"part {file.name} is not what was uploaded"
                digest.update(content)
                stream.write(content)
        if digest.hexdigest() != oid:
            return "the SHA-256 of the parts is not the one that was announced"
        size = partial.stat().st_size
        partial.replace(state.blob(oid))
    finally:
        partial.unlink(missing_ok=True)
    shutil.rmtree(folder)
    state.add_object(key, oid, size)
    return None
