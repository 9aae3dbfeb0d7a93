"""The binary formats of the Xet protocol that a store must read: xorbs, their compressed chunks, and shards.

Sources: the Xet protocol specification (huggingface.co/docs/xet: xorb, shard, upload-protocol) and the structures of
huggingface/xet-core (xet_core_structures: xorb_object/xorb_chunk_format, metadata_shard/file_structs, xorb_structs and
shard_format); LZ4's lz4_Frame_format.md and lz4_Block_format.md (github.com/lz4/lz4/tree/dev/doc). All numbers are
little-endian. The xxh32 checksums that a LZ4 frame may hold are skipped: the Xet hashes cover the content.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAX_XORB = 64 * 1024 * 1024  # bytes as sent, from the specification
MAX_CHUNK = 128 * 1024  # bytes of content
_SHARD_TAG = b"HFRepoMetaData\0" + bytes.fromhex("556967456a7b815783a5bdd95ccdd14aa9")
_BOOKEND = b"\xff" * 32
_VERIFIED, _WITH_METADATA = 1 << 31, 1 << 30
_ENTRY = 48  # bytes of every entry of a shard


class FormatError(Exception):
    """Bytes that are not what they should be."""


@dataclass(frozen=True)
class PackedChunk:
    """A chunk as it lies in a xorb: bytes ``[start, end)`` with the 8-byte header; ``size`` bytes of content."""

    start: int
    end: int
    size: int
    scheme: int  # 0 none, 1 LZ4 frame, 2 bytes grouped by their position in 4-byte words, then LZ4


@dataclass(frozen=True)
class Term:
    """A part of a file: chunks ``[first, end)`` of a xorb, ``size`` bytes; ``check`` is the term hash."""

    xorb: bytes
    first: int
    end: int
    size: int
    check: bytes | None


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard: its Xet hash, the sha256 as 32 bytes in Xet order if it was given, and its terms."""

    hash: bytes
    sha256: bytes | None
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Shard:
    """The files of an upload, and of every xorb that is new in it the chunks' hashes."""

    files: tuple[ShardFile, ...]
    xorbs: dict[bytes, tuple[bytes, ...]]


def parse_xorb(body: bytes) -> list[PackedChunk]:
    """The chunks of a xorb as it is uploaded: without a footer.

    Raises:
        FormatError: cut short, an unknown version or scheme, a chunk over the limit, or no chunk.
    """
    chunks = []
    position = 0
    while position < len(body):
        if position + 8 > len(body):
            raise FormatError(f"xorb: a chunk header is cut short at byte {position}")
        packed = int.from_bytes(body[position + 1 : position + 4], "little")
        scheme = body[position + 4]
        size = int.from_bytes(body[position + 5 : position + 8], "little")
        end = position + 8 + packed
        if body[position] != 0 or scheme > 2 or not 0 < size <= MAX_CHUNK or end > len(body):
            raise FormatError(f"xorb: no chunk at byte {position}")
        chunks.append(PackedChunk(position, end, size, scheme))
        position = end
    if not chunks:
        raise FormatError("xorb: empty")
    return chunks


def unpack_chunk(body: bytes, chunk: PackedChunk) -> bytes:
    """The content of a chunk of this xorb."""
    content = body[chunk.start + 8 : chunk.end]
    if chunk.scheme > 0:
        content = decode_lz4_frame(content)
    if chunk.scheme == 2:
        content = _ungroup(content)
    if len(content) != chunk.size:
        raise FormatError(f"xorb: the chunk at byte {chunk.start} has {len(content)} bytes, not {chunk.size}")
    return content


def _ungroup(grouped: bytes) -> bytes:
    """Undo the byte grouping: first all bytes at 0, 4, 8, …, then all at 1, 5, …, and so on."""
    content = bytearray(len(grouped))
    start = 0
    for lane in range(4):
        count = len(range(lane, len(grouped), 4))
        content[lane::4] = grouped[start : start + count]
        start += count
    return bytes(content)


def decode_lz4_frame(frame: bytes) -> bytes:
    """The content of one LZ4 frame without a dictionary. Raises FormatError."""
    try:
        magic, flags = struct.unpack_from("<IB", frame)
        if magic != 0x184D2204 or flags >> 6 != 1 or flags & 1:
            raise FormatError("lz4: not a frame that can be read")
        position = 7 + (8 if flags & 0x08 else 0)
        content = bytearray()
        while True:
            (size,) = struct.unpack_from("<I", frame, position)
            position += 4
            if size == 0:
                return bytes(content)
            block = frame[position : position + (size & 0x7FFFFFFF)]
            if size >> 31:
                content += block
            else:
                _decode_lz4_block(block, content)
            position += len(block) + (4 if flags & 0x10 else 0)
    except (struct.error, IndexError) as error:
        raise FormatError("lz4: the frame is cut short") from error


def _decode_lz4_block(block: bytes, content: bytearray) -> None:
    """Append a block's content; matches may reach back into earlier blocks."""
    position = 0
    while True:
        token = block[position]
        position += 1
        length, position = _lz4_length(block, position, token >> 4)
        content += block[position : position + length]
        position += length
        if position >= len(block):  # the last sequence has no match
            return
        offset = block[position] | block[position + 1] << 8
        length, position = _lz4_length(block, position + 2, token & 15)
        length += 4
        start = len(content) - offset
        if offset == 0 or start < 0:
            raise FormatError("lz4: a match reaches before the start")
        if offset >= length:
            content += content[start : start + length]
        else:
            content += (content[start:] * (length // offset + 1))[:length]


def _lz4_length(block: bytes, position: int, length: int) -> tuple[int, int]:
    if length == 15:
        while True:
            more = block[position]
            position += 1
            length += more
            if more != 255:
                break
    return length, position


def parse_shard(body: bytes) -> Shard:
    """Read a shard as it is uploaded: header, files, xorbs; a footer is not needed and not read.

    Raises:
        FormatError: another format or version, or cut short.
    """
    if len(body) < _ENTRY or body[:32] != _SHARD_TAG or struct.unpack_from("<Q", body, 32)[0] != 2:
        raise FormatError("shard: not a shard of version 2")
    entries = [body[start : start + _ENTRY] for start in range(_ENTRY, len(body) - _ENTRY + 1, _ENTRY)]
    try:
        files, position = _shard_files(entries)
        return Shard(files, _shard_xorbs(entries, position))
    except IndexError as error:
        raise FormatError("shard: cut short") from error


def _shard_files(entries: list[bytes]) -> tuple[tuple[ShardFile, ...], int]:
    files = []
    position = 0
    while entries[position][:32] != _BOOKEND:
        name, flags, count = struct.unpack_from("<32sII", entries[position])
        position += 1
        checked = bool(flags & _VERIFIED)
        terms = []
        for index in range(position, position + count):
            xorb, _, size, first, end = struct.unpack("<32sIIII", entries[index])
            terms.append(Term(xorb, first, end, size, entries[index + count][:32] if checked else None))
        position += count * (2 if checked else 1)
        sha256 = entries[position][:32] if flags & _WITH_METADATA else None
        position += 1 if flags & _WITH_METADATA else 0
        files.append(ShardFile(name, sha256, tuple(terms)))
    return tuple(files), position + 1


def _shard_xorbs(entries: list[bytes], position: int) -> dict[bytes, tuple[bytes, ...]]:
    xorbs = {}
    while entries[position][:32] != _BOOKEND:
        name, _, count = struct.unpack_from("<32sII", entries[position])
        xorbs[name] = tuple(entries[index][:32] for index in range(position + 1, position + 1 + count))
        position += 1 + count
    return xorbs
