"""An append-only zip writer: stored entries, strictly sequential output, record data aligned as torch aligns it.

Format: PKWARE APPNOTE.TXT 6.3.10 (local header 4.3.7, central directory 4.3.12, zip64 4.3.14 and 4.5.3). The data of
every record starts at a multiple of 64 bytes, reached with an extra field ``FB`` in the local header, as
``PyTorchStreamWriter`` (caffe2/serialize/inline_container.cc) does it, so that records can be memory-mapped.

Unlike Python's ``zipfile`` nothing that was written is ever changed: the CRC-32 is known before the header goes out, so
a digest of the whole file can be taken while it is written. The same records give the same bytes: no clock, no host.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aoconvert.formats.output_file import Buffer

ALIGNMENT = 64
"""Bytes; what torch.save uses."""

_MAX_16 = 0xFFFF
_MAX_32 = 0xFFFFFFFF  # a 32-bit field with this value says: look into the zip64 extra field
_UTF8_NAME = 0x0800
_DOS_DATE = 0x0021  # 1980-01-01, the earliest a zip can hold
_VERSION_STORED, _VERSION_ZIP64 = 20, 45
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_ZIP64_END = struct.Struct("<4sQ2H2I4Q")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


@dataclass(frozen=True)
class Entry:
    """A stored record: its full name, payload bytes, CRC-32, and where its local header starts in the archive."""

    name: str
    size: int
    crc: int
    offset: int


def _zip64_extra(values: Iterable[int]) -> bytes:
    """Extra field 0x0001 with the 64-bit ``values`` that did not fit; empty when there are none."""
    packed = b"".join(struct.pack("<Q", value) for value in values)
    return struct.pack("<HH", 0x0001, len(packed)) + packed if packed else b""


def local_header(entry: Entry) -> bytes:
    """The local header of ``entry``, padded so that the payload right after it starts 64-byte aligned."""
    name = entry.name.encode()
    big = entry.size >= _MAX_32
    zip64 = _zip64_extra([entry.size, entry.size] if big else [])
    start = entry.offset + _LOCAL_HEADER.size + len(name) + len(zip64) + 4
    padding = -start % ALIGNMENT
    extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    size = min(entry.size, _MAX_32)
    version = _VERSION_ZIP64 if big else _VERSION_STORED
    fixed = _LOCAL_HEADER.pack(
        b"PK\x03\x04", version, _UTF8_NAME, 0, 0, _DOS_DATE, entry.crc, size, size, len(name), len(extra)
    )
    return fixed + name + extra


def _central_header(entry: Entry) -> bytes:
    name = entry.name.encode()
    extra = _zip64_extra(value for value in (entry.size, entry.size, entry.offset) if value >= _MAX_32)
    size, offset = min(entry.size, _MAX_32), min(entry.offset, _MAX_32)
    version = _VERSION_ZIP64 if extra else _VERSION_STORED
    fixed = _CENTRAL_HEADER.pack(
        b"PK\x01\x02", version, version, _UTF8_NAME, 0, 0, _DOS_DATE, entry.crc, size, size,
        len(name), len(extra), 0, 0, 0, 0, offset,
    )  # fmt: skip
    return fixed + name + extra


def central_directory(entries: Iterable[Entry], offset: int) -> bytes:
    """Everything after the last record, for an archive whose records end at byte ``offset``.

    The zip64 end records are always written, as torch does: one code path for every size.
    """
    headers = [_central_header(entry) for entry in entries]
    count, size = len(headers), sum(map(len, headers))
    zip64_end = _ZIP64_END.pack(
        b"PK\x06\x06", _ZIP64_END.size - 12, _VERSION_ZIP64, _VERSION_ZIP64, 0, 0, count, count, size, offset
    )
    locator = _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, offset + size, 1)
    short = min(count, _MAX_16)
    end = _END.pack(b"PK\x05\x06", 0, 0, short, short, min(size, _MAX_32), min(offset, _MAX_32), 0)
    return b"".join([*headers, zip64_end, locator, end])


def archive_size(records: Iterable[tuple[str, int]]) -> int:
    """Bytes of the archive that holds ``records`` (name, payload bytes) in this order. Exact; needs no data."""
    entries, offset = [], 0
    for name, size in records:
        entry = Entry(name, size, 0, offset)
        entries.append(entry)
        offset += len(local_header(entry)) + size
    return offset + len(central_directory(entries, offset))


def end_of(entry: Entry) -> int:
    """Where the record's payload ends, and the next record starts."""
    return entry.offset + len(local_header(entry)) + entry.size


class ZipStream:
    """Writes a zip archive through ``write``, front to back.

    Args:
        write: takes every byte of the archive once, in order; must take the whole buffer or raise.
    """

    def __init__(self, write: Callable[[Buffer], None]) -> None:
        self._write = write
        self._entries: list[Entry] = []
        self._offset = 0

    @property
    def entries(self) -> list[Entry]:
        """The records so far."""
        return self._entries

    @property
    def offset(self) -> int:
        """Where the next record starts."""
        return self._offset

    def append(self, entry: Entry) -> None:
        """Take in a record that is in the archive already: header and payload were written by the caller."""
        assert entry.offset == self._offset
        self._entries.append(entry)
        self._offset = end_of(entry)

    def add(self, name: str, payload: Buffer) -> None:
        """Append one record. ``payload`` is contiguous bytes and is not copied."""
        size = payload.nbytes if isinstance(payload, memoryview) else len(payload)
        entry = Entry(name, size, zlib.crc32(payload), self._offset)
        header = local_header(entry)
        self._write(header)
        if size:
            self._write(payload)
        self.append(entry)

    def finish(self) -> None:
        """Write the directory. Nothing can be added after it."""
        self._write(central_directory(self._entries, self._offset))
