"""The zip archive of a torch ``.bin``, read so that no second reader can see another content in it.

Format: PKWARE's APPNOTE.TXT 6.3 (4.3.7 local header, 4.3.9 data descriptor, 4.3.12 central directory, 4.3.14 to 4.3.16
end records). torch writes every record stored, never compressed, one after the other: so every byte of the file must
belong to one record or to the directory, in order, and both headers of a record must say the same. That rule excludes
overlaps, hidden data, prefixes, comments and second directories all at once.

Memory is bounded by the directory's size, and no storage is read.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from aoconvert.errors import UnsafeZipError
from aoconvert.sources.byte_source import ByteSource

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_DESCRIPTOR = 0x0008
_UTF8 = 0x0800

_MAX_DIRECTORY = 32 << 20
_MAX_RECORDS = 250_000
_MAX_NAME = 512
_MAX_SLACK = _MAX_16 + 24  # a local header's extra, with which torch aligns the payload, and a data descriptor

_HINT_DAMAGED = "the copy or download may have been cut short: fetch the file again"
_NAME = re.compile(r"[^/\\:\x00-\x1f\x7f]+(?:/[^/\\:\x00-\x1f\x7f]+)+")
_RECORDS = re.compile(r"data\.pkl|byteorder|version|data/[0-9]{1,20}|\.[\w.-]+(?:/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Record:
    """One record of the archive.

    Attributes:
        name: without the archive's prefix: ``data.pkl``, ``data/0``.
        header_offset: byte in the file where its local header starts.
        offset: byte in the file where its payload starts; ``None`` while its local header has not been read.
        size: payload bytes.
        crc: CRC-32 of the payload, as the archive says.
        flags: general purpose bits (``0x8``: a data descriptor follows).
        end: byte in the file where the next record or the directory starts.
    """

    name: str
    header_offset: int
    offset: int | None
    size: int
    crc: int
    flags: int
    end: int


@dataclass(frozen=True)
class Archive:
    """A torch archive: the folder name all records lie in, and the records by name without it, as they lie."""

    prefix: str
    records: Mapping[str, Record]

    def storages(self) -> dict[str, Record]:
        """The records that hold storages, by key."""
        return {name.removeprefix("data/"): record for name, record in self.records.items() if name.startswith("data/")}


@dataclass(frozen=True)
class _Listed:
    """What the central directory says of one record; ``name`` with the prefix."""

    name: str
    header_offset: int
    size: int
    crc: int
    flags: int


def read_archive(source: ByteSource, *, local_headers: bool = True) -> Archive:
    """Read the directory of a torch archive and check it against the records.

    Args:
        source: the file.
        local_headers: also read and compare the local header of every storage. Without it (a remote file, where each
            costs a request) storages have no ``offset`` and are only checked to fit between their neighbours.

    Raises:
        UnsafeZipError: damaged, or not an archive as torch writes them; the message says what and where.
        SourceError: the bytes could not be read.
    """
    start, count, end = _directory_place(source)
    listed = _read_directory(source.read(start, end - start), start, count)
    listed.sort(key=lambda record: record.header_offset)
    prefix = _check_names(listed)
    records: dict[str, Record] = {}
    if listed[0].header_offset != 0:
        raise UnsafeZipError(f"{listed[0].header_offset} bytes before the first record {_show(listed[0].name)}")
    for index, item in enumerate(listed):
        following = listed[index + 1].header_offset if index + 1 < len(listed) else start
        name = item.name[len(prefix) + 1 :]
        record = Record(name, item.header_offset, None, item.size, item.crc, item.flags, following)
        slack = following - item.header_offset - _LOCAL.size - len(item.name.encode()) - item.size
        if slack < 0:
            raise UnsafeZipError(
                f"record {_show(item.name)} at byte {item.header_offset} overlaps what follows it", hint=_HINT_DAMAGED
            )
        if slack > _MAX_SLACK:
            raise UnsafeZipError(f"{slack} unaccounted bytes around record {_show(item.name)}")
        if local_headers or not name.startswith("data/"):
            record = _locate(source, record, item.name)
        records[name] = record
    return Archive(prefix, records)


def read_record(source: ByteSource, archive: Archive, name: str, limit: int) -> bytes:
    """The payload of a small record, its CRC checked.

    Raises:
        UnsafeZipError: larger than ``limit`` bytes, or damaged.
        SourceError: the bytes could not be read.
    """
    record = archive.records[name]
    if record.size > limit:
        raise UnsafeZipError(f"record {_show(name)} has {record.size:,} bytes, at most {limit:,} are accepted")
    if record.offset is None:
        raise ValueError(f"the local header of {name} has not been read")
    payload = source.read(record.offset, record.size)
    if zlib.crc32(payload) != record.crc:
        raise UnsafeZipError(f"record {_show(name)} is damaged: its CRC-32 is wrong", hint=_HINT_DAMAGED)
    return payload


def _show(name: str) -> str:
    """A name from the file, safe to print."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def _directory_place(source: ByteSource) -> tuple[int, int, int]:
    """Start of the directory, number of its records, and its end; both end records checked."""
    size = source.size
    if size < _END.size:
        raise UnsafeZipError(f"{size} bytes are too few for a zip archive", hint=_HINT_DAMAGED)
    tail_size = min(size, _END64.size + _LOCATOR.size + _END.size)
    tail = source.read(size - tail_size, tail_size)
    mark, disk, disk_start, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    if mark != b"PK\x05\x06" or comment:
        raise _no_end(source)
    end = size - _END.size
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    sentinels = _MAX_16 in (here, count) or _MAX_32 in (length, start)
    if locator[:4] == b"PK\x06\x07":
        count64, length64, start64 = _zip64_end(tail, locator, size)
        for short, long, top in ((count, count64, _MAX_16), (length, length64, _MAX_32), (start, start64, _MAX_32)):
            if short not in (long, top):
                raise UnsafeZipError("the two end records of the zip archive contradict each other")
        here = count64 if here == _MAX_16 else here
        count, length, start, end = count64, length64, start64, size - tail_size
    elif sentinels:
        raise UnsafeZipError("the zip archive lacks its zip64 end record", hint=_HINT_DAMAGED)
    if disk or disk_start or here != count:
        raise UnsafeZipError("the zip archive is split over several files")
    if start + length != end:
        raise UnsafeZipError(
            f"the zip directory does not end at byte {end}, where its end record starts", hint=_HINT_DAMAGED
        )
    if length > _MAX_DIRECTORY or count > _MAX_RECORDS:
        raise UnsafeZipError(f"the zip directory has {count:,} records in {length:,} bytes: more than is accepted")
    return start, count, end


def _no_end(source: ByteSource) -> UnsafeZipError:
    if source.read(0, min(source.size, 4)) != b"PK\x03\x04":
        return UnsafeZipError("not a zip archive", hint="a .bin file that torch.save wrote is a zip archive")
    return UnsafeZipError("the zip archive does not end with its end record: it was cut short, or other data follows",
                          hint=_HINT_DAMAGED)  # fmt: skip


def _zip64_end(tail: bytes, locator: bytes, size: int) -> tuple[int, int, int]:
    """Records, bytes and start of the directory from the zip64 end record, which must lie right before its locator."""
    _, disk, place, disks = _LOCATOR.unpack(locator)
    end = tail[: _END64.size]
    if len(tail) < _END64.size + _LOCATOR.size + _END.size or place != size - len(tail) or end[:4] != b"PK\x06\x06":
        raise UnsafeZipError("the zip64 end record is not right before its locator", hint=_HINT_DAMAGED)
    _, rest, _, _, this_disk, start_disk, here, count, length, start = _END64.unpack(end)
    if rest != _END64.size - 12 or disk or this_disk or start_disk or disks > 1 or here != count:
        raise UnsafeZipError("the zip64 end record is not as torch writes it")
    return count, length, start


def _read_directory(directory: bytes, start: int, count: int) -> list[_Listed]:
    listed: list[_Listed] = []
    position = 0
    while position < len(directory):
        if len(directory) - position < _CENTRAL.size:
            raise UnsafeZipError(f"the zip directory is cut at byte {start + position}", hint=_HINT_DAMAGED)
        listed.append(_central_header(directory, position, start))
        name_size, extra_size = struct.unpack_from("<2H", directory, position + 28)
        position += _CENTRAL.size + name_size + extra_size
        if len(listed) > count:
            break
    if len(listed) != count or not listed:
        raise UnsafeZipError(f"the zip directory lists {len(listed)} records, its end record says {count}")
    return listed


def _central_header(directory: bytes, position: int, start: int) -> _Listed:
    where = f"the zip directory's record at byte {start + position}"
    (
        mark, _, _, flags, method, _, _, crc, packed, size,
        name_size, extra_size, comment_size, disk, _, _, offset,
    ) = _CENTRAL.unpack_from(directory, position)  # fmt: skip
    body = directory[position + _CENTRAL.size : position + _CENTRAL.size + name_size + extra_size]
    if mark != b"PK\x01\x02" or len(body) != name_size + extra_size:
        raise UnsafeZipError(f"{where} is damaged", hint=_HINT_DAMAGED)
    name = _decode(body[:name_size], where)
    where = f"record {_show(name)}"
    _check_storing(where, flags, method)
    sizes = [value for value in (size, packed, offset) if value == _MAX_32]
    wide = _zip64_extra(body[name_size:], len(sizes), where)
    size, packed, offset = (wide.pop(0) if value == _MAX_32 else value for value in (size, packed, offset))
    if packed != size:
        raise UnsafeZipError(f"{where} is stored in {packed:,} bytes and would give {size:,}")
    if comment_size or disk:
        raise UnsafeZipError(f"{where} has a comment, or is in another file")
    if offset >= start or size > start:
        raise UnsafeZipError(f"{where} is outside the file", hint=_HINT_DAMAGED)
    return _Listed(name, offset, size, crc, flags)


def _decode(raw: bytes, where: str) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnsafeZipError(f"the name in {where} is not UTF-8") from error
    if len(raw) > _MAX_NAME:
        raise UnsafeZipError(f"the name in {where} has {len(raw)} bytes")
    return name


def _check_storing(where: str, flags: int, method: int) -> None:
    if flags & _ENCRYPTED:
        raise UnsafeZipError(f"{where} is encrypted")
    if method:
        raise UnsafeZipError(f"{where} is compressed (method {method}); torch never compresses")
    if flags & ~(_DESCRIPTOR | _UTF8):
        raise UnsafeZipError(f"{where} has flags {flags:#06x} that torch never sets")


def _zip64_extra(extra: bytes, wanted: int, where: str) -> list[int]:
    """The 64-bit values of a central header's extra field, which holds exactly those and nothing else."""
    if not wanted and not extra:
        return []
    expected = struct.pack("<2H", 1, 8 * wanted)
    if not wanted or extra[:4] != expected or len(extra) != 4 + 8 * wanted:
        raise UnsafeZipError(f"{where} has an extra field that torch never writes")
    return list(struct.unpack_from(f"<{wanted}Q", extra, 4))


def _check_names(listed: list[_Listed]) -> str:
    """The prefix that all names share, every name checked."""
    seen: set[str] = set()
    for record in listed:
        parts = record.name.split("/")
        if not _NAME.fullmatch(record.name) or "." in parts or ".." in parts:
            raise UnsafeZipError(f"record {_show(record.name)} has a name that torch never writes")
        if record.name in seen:
            raise UnsafeZipError(f"two records are called {_show(record.name)}")
        seen.add(record.name)
    prefixes = sorted({name.partition("/")[0] for name in seen})
    if len(prefixes) > 1:
        raise UnsafeZipError(f"two archives in one: {_show(prefixes[0])} and {_show(prefixes[1])}")
    prefix = prefixes[0]
    for name in seen:
        if not _RECORDS.fullmatch(name[len(prefix) + 1 :]):
            raise UnsafeZipError(f"record {_show(name)} does not belong in a checkpoint that torch.save writes")
    if f"{prefix}/data.pkl" not in seen:
        raise UnsafeZipError(
            f"the record {_show(prefix + '/data.pkl')} is missing", hint="this zip archive is not a checkpoint"
        )
    return prefix


def _locate(source: ByteSource, record: Record, full_name: str) -> Record:
    """``record`` with the offset of its payload, its local header and data descriptor checked against the directory."""
    where = f"record {_show(full_name)} at byte {record.header_offset}"
    raw_name = full_name.encode()
    header = source.read(record.header_offset, _LOCAL.size + len(raw_name))
    mark, _, flags, method, _, _, crc, packed, size, name_size, extra_size = _LOCAL.unpack_from(header)
    if mark != b"PK\x03\x04":
        raise UnsafeZipError(f"{where} has no local header", hint=_HINT_DAMAGED)
    if (flags, method) != (record.flags, 0) or header[_LOCAL.size :] != raw_name or name_size != len(raw_name):
        raise UnsafeZipError(f"{where}: its local header and the zip directory contradict each other")
    offset = record.header_offset + len(header) + extra_size
    gap = record.end - offset - record.size
    if gap < 0:
        raise UnsafeZipError(f"{where} overlaps what follows it", hint=_HINT_DAMAGED)
    described = bool(flags & _DESCRIPTOR)
    if _MAX_32 in (packed, size):
        size, packed = _local_sizes(source, offset - extra_size, extra_size, where)
    expected = (record.crc, record.size, record.size)
    if (crc, size, packed) != expected and not (described and (crc, size, packed) == (0, 0, 0)):
        raise UnsafeZipError(f"{where}: its local header and the zip directory contradict each other")
    if described:
        _check_descriptor(source, record, gap, where)
    elif gap:
        raise UnsafeZipError(f"{gap} unaccounted bytes after {where}")
    return Record(record.name, record.header_offset, offset, record.size, record.crc, record.flags, record.end)


def _local_sizes(source: ByteSource, start: int, count: int, where: str) -> tuple[int, int]:
    """Size and stored size from the zip64 field, the first one of a local header's extra."""
    extra = source.read(start, min(count, 20))
    if len(extra) < 20 or extra[:2] != b"\x01\x00" or int.from_bytes(extra[2:4], "little") < 16:
        raise UnsafeZipError(f"{where} lacks its zip64 sizes", hint=_HINT_DAMAGED)
    size, packed = struct.unpack_from("<2Q", extra, 4)
    return size, packed


def _check_descriptor(source: ByteSource, record: Record, gap: int, where: str) -> None:
    """The data descriptor fills the gap to the next record and repeats the directory's CRC and sizes."""
    wide = struct.pack("<4sI2Q", b"PK\x07\x08", record.crc, record.size, record.size)
    short = struct.pack("<4sI2I", b"PK\x07\x08", record.crc, record.size & _MAX_32, record.size & _MAX_32)
    accepted = (wide,) if record.size > _MAX_32 else (short, wide)
    if gap not in (len(short), len(wide)) or source.read(record.end - gap, gap) not in accepted:
        raise UnsafeZipError(f"the data descriptor after {where} is wrong", hint=_HINT_DAMAGED)
