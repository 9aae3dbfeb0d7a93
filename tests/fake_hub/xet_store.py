"""The objects of a Xet store, on disk: what it keeps and checks, apart from how it is served.

Layout of the folder::

    xorbs/<hash>         a xorb as it was uploaded
    xorbs/<hash>.json    its chunks: [[hash, first byte, byte after the last, size of the content]]
    files/<hash>.json    {size, sha256, terms: [[xorb, first chunk, chunk after the last, size]]}
    sha256/<sha256>      the Xet hash of the file with that content

Everything that an upload claims is computed again from the content: the hashes of chunks, xorbs, terms and files, the
sizes, and the sha256 ("Upload Protocol" and "Hashing" of huggingface.co/docs/xet). The real store is not known to
check the sha256. Not checked: where the client cut its chunks, and the bookkeeping sizes in a shard's xorb section.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fake_hub.xet_format import (
    MAX_XORB,
    FormatError,
    PackedChunk,
    ShardFile,
    Term,
    parse_shard,
    parse_xorb,
    unpack_chunk,
)
from fake_hub.xet_hash import NO_HASH, chunk_hashes, file_hash, merkle_root, term_hash, to_hex


class Refused(Exception):
    """An upload that the store does not take, and why."""


@dataclass(frozen=True)
class _Chunk:
    hash: bytes
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class Part:
    """A run of chunks ``[first, end)`` of a xorb, ``size`` bytes of a file."""

    xorb: str
    first: int
    end: int
    size: int


class XetStore:
    """Xorbs and files. Every method may be called from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("xorbs", "files", "sha256"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def put_xorb(self, name: str, body: bytes) -> bool:
        """Keep a xorb; returns whether it is new. Raises Refused if it is damaged or not the one that was named."""
        if len(body) > MAX_XORB:
            raise Refused(f"xorb of {len(body)} bytes, more than {MAX_XORB}")
        try:
            packed = parse_xorb(body)
            contents = [unpack_chunk(body, chunk) for chunk in packed]
        except FormatError as error:
            raise Refused(str(error)) from error
        hashes = chunk_hashes(contents)
        found = to_hex(merkle_root([(digest, len(content)) for digest, content in zip(hashes, contents, strict=True)]))
        if found != name:
            raise Refused(f"xorb {name}: the content has the hash {found}")
        if self._table(name).is_file():
            return False
        table = [
            [digest.hex(), chunk.start, chunk.end, chunk.size] for digest, chunk in zip(hashes, packed, strict=True)
        ]
        _write(self.xorb(name), body)
        _write(self._table(name), json.dumps(table).encode())
        return True

    def put_shard(self, body: bytes) -> bool:
        """Register the files of a shard, all or none; returns whether one is new. Raises Refused."""
        try:
            shard = parse_shard(body)
        except FormatError as error:
            raise Refused(str(error)) from error
        for xorb, hashes in shard.xorbs.items():
            if tuple(chunk.hash for chunk in self._chunks(to_hex(xorb))) != hashes:
                raise Refused(f"shard: other chunks than those of xorb {to_hex(xorb)}")
        checked = [(to_hex(file.hash), *self._check(file)) for file in shard.files]
        new = False
        for name, parts, sha256 in checked:
            new = new or not self._file(name).is_file()
            terms = [[part.xorb, part.first, part.end, part.size] for part in parts]
            size = sum(part.size for part in parts)
            _write(self._file(name), json.dumps({"size": size, "sha256": sha256, "terms": terms}).encode())
            _write(self.root / "sha256" / sha256, name.encode())
        return new

    def lookup(self, sha256: str) -> tuple[str, int] | None:
        """The Xet hash and the size of the file with this content."""
        file = self.root / "sha256" / sha256
        if not file.is_file():
            return None
        name = file.read_text()
        return name, sum(part.size for part in self.parts(name) or ())

    def parts(self, name: str) -> list[Part] | None:
        """The runs of chunks that a file consists of; ``None`` for no such file."""
        if not self._file(name).is_file():
            return None
        return [Part(*term) for term in json.loads(self._file(name).read_text())["terms"]]

    def read(self, name: str) -> bytes:
        """The content of a file. Raises KeyError."""
        parts = self.parts(name)
        if parts is None:
            raise KeyError(name)
        return b"".join(self._content(part) for part in parts)

    def xorb(self, name: str) -> Path:
        return self.root / "xorbs" / name

    def sizes(self, part: Part) -> list[int]:
        """The content sizes of a part's chunks."""
        return [chunk.size for chunk in self._chunks(part.xorb)[part.first : part.end]]

    def byte_range(self, xorb: str, first: int, end: int) -> tuple[int, int]:
        """First and last byte of a xorb's chunks ``[first, end)``."""
        chunks = self._chunks(xorb)
        return chunks[first].start, chunks[end - 1].end - 1

    def _file(self, name: str) -> Path:
        return self.root / "files" / f"{name}.json"

    def _table(self, xorb: str) -> Path:
        return self.root / "xorbs" / f"{xorb}.json"

    def _chunks(self, xorb: str) -> list[_Chunk]:
        if not self._table(xorb).is_file():
            raise Refused(f"xorb {xorb} was not uploaded")
        return [_Chunk(bytes.fromhex(digest), *rest) for digest, *rest in json.loads(self._table(xorb).read_text())]

    def _check(self, file: ShardFile) -> tuple[list[Part], str]:
        """A file's parts and sha256, after everything that the shard says about it was found true."""
        name = to_hex(file.hash)
        nodes: list[tuple[bytes, int]] = []
        for term in file.terms:
            nodes += self._check_term(name, term)
        if file_hash(nodes) != file.hash:
            raise Refused(f"shard: the content of file {name} has another hash")
        parts = [Part(to_hex(term.xorb), term.first, term.end, term.size) for term in file.terms]
        sha256 = hashlib.sha256(b"".join(self._content(part) for part in parts)).hexdigest()
        # hf_xet 1.8.0 states zeros for an empty file.
        if file.sha256 not in (None, NO_HASH) and to_hex(file.sha256) != sha256:
            raise Refused(f"shard: the content of file {name} has another sha256")
        return parts, sha256

    def _check_term(self, name: str, term: Term) -> Sequence[tuple[bytes, int]]:
        chunks = self._chunks(to_hex(term.xorb))[term.first : term.end]
        if term.first >= term.end or len(chunks) != term.end - term.first:
            raise Refused(f"shard: file {name} has chunks that xorb {to_hex(term.xorb)} has not")
        if sum(chunk.size for chunk in chunks) != term.size:
            raise Refused(f"shard: a term of file {name} has another size")
        if term.check != term_hash([chunk.hash for chunk in chunks]):
            raise Refused(f"shard: a term of file {name} is not verified by its chunks")
        return [(chunk.hash, chunk.size) for chunk in chunks]

    def _content(self, part: Part) -> bytes:
        body = self.xorb(part.xorb).read_bytes()
        packed: list[PackedChunk] = parse_xorb(body)[part.first : part.end]
        return b"".join(unpack_chunk(body, chunk) for chunk in packed)


def _write(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    partial.write_bytes(content)
    partial.replace(path)
