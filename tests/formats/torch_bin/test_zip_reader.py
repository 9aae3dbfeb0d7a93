"""The zip reader: real archives, and every way in which an archive can show two contents."""

import io
import struct
import warnings
import zipfile
import zlib

import pytest
import torch
from hostile_pickles import archive, tensor, top

from aoconvert.errors import UnsafeZipError
from aoconvert.formats.torch_bin.header import read_bin
from aoconvert.formats.torch_bin.zip_reader import read_archive, read_record
from aoconvert.sources.byte_source import LocalFile

CLEAN = archive(top(tensor()))


class Memory:
    """Bytes as a source; ``sparse`` places further parts in a huge file of zeros."""

    def __init__(self, data, size=None, sparse=()):
        self.data, self.size, self.sparse = data, len(data) if size is None else size, sparse

    def read(self, offset, count):
        assert min(offset, count) >= 0 and offset + count <= self.size, "read outside the file"
        assert count < 1 << 26
        out = bytearray(count)
        for start, part in ((0, self.data), *self.sparse):
            first, last = max(offset, start), min(offset + count, start + len(part))
            if first < last:
                out[first - offset : last - offset] = part[first - start : last - start]
        return bytes(out)


def directory_start(data):
    return struct.unpack("<I", data[-6:-2])[0]


def central(data, index):
    """Byte of the central header with this index."""
    place = directory_start(data)
    for _ in range(index):
        place += 46 + sum(struct.unpack("<3H", data[place + 28 : place + 34]))
    return place


def local(data, index):
    return struct.unpack("<I", data[central(data, index) + 42 : central(data, index) + 46])[0]


def changed(data, *edits):
    out = bytearray(data)
    for place, value in edits:
        out[place : place + len(value)] = value
    return bytes(out)


def both(index, field_local, field_central, value):
    return changed(CLEAN, (local(CLEAN, index) + field_local, value), (central(CLEAN, index) + field_central, value))


def with_extra_record(name, payload=b"x", **options):
    buffer = io.BytesIO(CLEAN)
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "a") as file:
        info = zipfile.ZipInfo(name)
        for key, value in options.items():
            setattr(info, key, value)
        file.writestr(info, payload)
    return buffer.getvalue()


def with_comment():
    return changed(CLEAN, (len(CLEAN) - 2, b"\x04\x00")) + b"evil"


def with_prefix(correct):
    """Junk in front; with ``correct``, every offset is moved with it."""
    junk = b"#!/bin/sh\n"
    if not correct:
        return junk + CLEAN
    out = bytearray(junk + CLEAN)
    for index in range(4):
        place = central(CLEAN, index) + len(junk) + 42
        out[place : place + 4] = struct.pack("<I", local(CLEAN, index) + len(junk))
    out[-6:-2] = struct.pack("<I", directory_start(CLEAN) + len(junk))
    return bytes(out)


def hidden_gap():
    """A second data.pkl between two records, in no directory."""
    place, junk = local(CLEAN, 1), b"PK\x03\x04" + b"hidden" * 10
    out = bytearray(CLEAN[:place] + junk + CLEAN[place:])
    for index in range(1, 4):
        header = central(CLEAN, index) + len(junk) + 42
        out[header : header + 4] = struct.pack("<I", local(CLEAN, index) + len(junk))
    out[-6:-2] = struct.pack("<I", directory_start(CLEAN) + len(junk))
    return bytes(out)


def two_directories():
    """The directory and its end twice: a reader from the front sees the first, one from the end the second."""
    start = directory_start(CLEAN)
    out = bytearray(CLEAN + CLEAN[start:])
    out[-6:-2] = struct.pack("<I", len(CLEAN))
    return bytes(out)


def compressed():
    return archive(top(tensor()), method=zipfile.ZIP_DEFLATED)


def bomb():
    return archive(bytes(50 << 20), method=zipfile.ZIP_DEFLATED)


def overlapping():
    """data/0 (third) takes its bytes from byteorder (second)."""
    return changed(CLEAN, (central(CLEAN, 2) + 42, struct.pack("<I", local(CLEAN, 1))))


def renamed(old, new):
    assert len(old) == len(new)
    return CLEAN.replace(old, new)


def unicode_path():
    """An extra field that gives a second name (Info-ZIP Unicode Path)."""
    start, name = central(CLEAN, 0), b"archive/evil.pkl"
    extra = struct.pack("<2HBI", 0x7075, 5 + len(name), 1, zlib.crc32(b"archive/data.pkl")) + name
    end = start + 46 + len("archive/data.pkl")
    out = bytearray(CLEAN[:end] + extra + CLEAN[end:])
    out[start + 30 : start + 32] = struct.pack("<H", len(extra))
    size = struct.unpack("<I", CLEAN[-10:-6])[0] + len(extra)
    out[-10:-6] = struct.pack("<I", size)
    return bytes(out)


def zip64(count=4, start=None, size=None, place=None, **ends):
    """CLEAN with the zip64 end records; the arguments make them wrong."""
    begin = directory_start(CLEAN)
    length = len(CLEAN) - 22 - begin
    end64 = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count,
        length if size is None else size, begin if start is None else start,
    )  # fmt: skip
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, begin + length if place is None else place, 1)
    end = CLEAN[-22:]
    for position, value in ends.values():
        end = changed(end, (position, value))
    return CLEAN[:-22] + end64 + locator + end


HOSTILE = {
    "empty": (b"", "too few"),
    "text": (b"hello, this is no archive at all", "not a zip archive"),
    "end cut off": (CLEAN[:-1], "does not end with its end record"),
    "half": (CLEAN[: len(CLEAN) // 2], "does not end with its end record"),
    "only its end": (CLEAN[-22:], "outside|does not end|cut"),
    "comment": (with_comment(), "does not end with its end record"),
    "something after the end": (CLEAN + b"\0", "does not end with its end record"),
    "prefix": (with_prefix(False), "does not end"),
    "prefix, offsets moved": (with_prefix(True), "10 bytes before the first record"),
    "hidden between records": (hidden_gap(), "unaccounted bytes"),
    "two directories": (two_directories(), "unaccounted"),
    "overlap": (overlapping(), "overlaps what follows|contradict each other"),
    "compressed": (compressed(), "compressed"),
    "zip bomb": (bomb(), "compressed"),
    "method only in the directory": (changed(CLEAN, (central(CLEAN, 0) + 10, b"\x08")), "compressed"),
    "method only in the record": (changed(CLEAN, (local(CLEAN, 0) + 8, b"\x08")), "contradict each other"),
    "encrypted": (both(0, 6, 8, b"\x01"), "encrypted"),
    "strongly encrypted": (both(0, 6, 8, b"\x41"), "encrypted"),
    "encrypted only in the record": (changed(CLEAN, (local(CLEAN, 0) + 6, b"\x01")), "contradict each other"),
    "patch data flag": (both(0, 6, 8, b"\x20"), "flags"),
    "another name in the record": (changed(CLEAN, (local(CLEAN, 0) + 30, b"b")), "contradict each other"),
    "another CRC in the record": (changed(CLEAN, (local(CLEAN, 0) + 14, b"\1\2\3\4")), "contradict each other"),
    "another size in the record": (changed(CLEAN, (local(CLEAN, 0) + 22, b"\1")), "contradict each other"),
    "another size in the directory": (changed(CLEAN, (central(CLEAN, 0) + 24, b"\1")), "would give"),
    "size to the next record": (both(2, 18, 20, b"\xff\xff\xff\x00" * 2), "outside|overlaps what follows"),
    "no local header": (changed(CLEAN, (local(CLEAN, 0), b"XX")), "no local header"),
    "descriptor that is not there": (both(0, 6, 8, b"\x08"), "descriptor"),
    "wrong CRC of data.pkl": (both(0, 14, 16, b"\1\2\3\4"), "CRC-32 is wrong"),
    "extra with a second name": (unicode_path(), "extra field"),
    "two data.pkl": (renamed(b"archive/byteorder", b"archive/data.pkl\0"), "never writes"),
    "one name twice": (with_extra_record("archive/version"), "two records are called"),
    "two archives": (with_extra_record("other/data.pkl"), "two archives"),
    "TorchScript": (with_extra_record("archive/constants.pkl"), "does not belong"),
    "code": (with_extra_record("archive/code/__torch__.py"), "does not belong"),
    "second pickle": (with_extra_record("archive/data/evil.pkl"), "does not belong"),
    "folder": (with_extra_record("archive/data/", b""), "never writes"),
    "outside": (with_extra_record("archive/../../etc/cron.d/x"), "never writes"),
    "absolute": (with_extra_record("/archive/data/1"), "never writes"),
    "backslash": (with_extra_record("archive/data\\1"), "never writes"),
    "drive": (with_extra_record("C:/data/1"), "never writes"),
    "newline": (with_extra_record("archive/data/1\n"), "never writes"),
    "no folder": (with_extra_record("data.pkl"), "never writes"),
    "long name": (with_extra_record("archive/data/" + "1" * 600), "600|613|does not belong"),
    "comment of a record": (with_extra_record("archive/data/1", comment=b"x"), "comment"),
    "no data.pkl": (renamed(b"archive/data.pkl", b"archive/.ata.pkl"), "the record 'archive/data.pkl' is missing"),
    "name that is not UTF-8": (renamed(b"archive/data.pkl", b"archive/dat\xff.pkl"), "not UTF-8"),
    "more records than said": (changed(CLEAN, (len(CLEAN) - 14, b"\3\0\3\0")), "end record says 3"),
    "fewer records than said": (changed(CLEAN, (len(CLEAN) - 14, b"\5\0\5\0")), "end record says 5"),
    "no record": (b"PK\x05\x06" + bytes(18), "lists 0 records"),
    "several disks": (changed(CLEAN, (len(CLEAN) - 18, b"\1")), "several files"),
    "directory elsewhere": (changed(CLEAN, (len(CLEAN) - 6, b"\0\0\0\0")), "does not end"),
    "sentinels without zip64": (changed(CLEAN, (len(CLEAN) - 6, b"\xff" * 4)), "lacks its zip64"),
    "zip64 elsewhere": (zip64(place=0), "not right before"),
    "zip64 says another count": (zip64(count=3), "contradict each other"),
    "zip64 says another place": (zip64(start=0), "contradict each other"),
    "zip64 says a huge count": (zip64(count=1 << 60, a=(8, b"\xff" * 4)), "more than is accepted|records"),
    "zip64 says a huge directory": (zip64(size=1 << 60, a=(12, b"\xff" * 4)), "does not end"),
    "directory damaged": (changed(CLEAN, (central(CLEAN, 1), b"XX")), "damaged"),
    "directory cut": (changed(CLEAN, (central(CLEAN, 3) + 28, b"\xff\xff")), "damaged"),
    "record beyond the file": (changed(CLEAN, (central(CLEAN, 2) + 42, b"\xff\xff\xff\x7f")), "outside"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("local_headers", [True, False])
def test_refused(name, local_headers, tmp_path):
    data, expected = HOSTILE[name]
    if local_headers:
        path = tmp_path / "model.bin"
        path.write_bytes(data)
        with pytest.raises(UnsafeZipError, match=expected) as caught:
            read_bin(path)
        assert caught.value.message.startswith(f"{path}: ")
        assert caught.value.message.isprintable()
        assert caught.value.exit_code == 4
        return
    source = Memory(data)
    with pytest.raises(UnsafeZipError):
        read_record(source, read_archive(source, local_headers=False), "data.pkl", 1 << 20)


def test_the_builders_differ_from_a_clean_archive_by_what_is_wrong_alone():
    for data in (CLEAN, zip64(), zip64(a=(8, b"\xff" * 4), b=(12, b"\xff" * 8)), with_extra_record("archive/data/1")):
        archive_ = read_archive(Memory(data))
        assert list(archive_.records)[:4] == ["data.pkl", "byteorder", "data/0", "version"]
        assert read_record(Memory(data), archive_, "byteorder", 16) == b"little"


def test_against_python_s_zipfile(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({str(index): torch.randn(index, 3) for index in range(70)}, path)
    with LocalFile(path) as source:
        ours = read_archive(source)
        with zipfile.ZipFile(path) as theirs:
            assert [f"{ours.prefix}/{name}" for name in ours.records] == theirs.namelist()
            for name, record in ours.records.items():
                payload = theirs.read(f"{ours.prefix}/{name}")
                assert (record.size, record.crc) == (len(payload), zlib.crc32(payload))
                assert read_record(source, ours, name, 1 << 20) == payload
        lazily = read_archive(source, local_headers=False)
        assert lazily.records["data.pkl"] == ours.records["data.pkl"]
        assert {record.offset for record in lazily.storages().values()} == {None}
        with pytest.raises(ValueError, match="has not been read"):
            read_record(source, lazily, "data/0", 1 << 20)
        with pytest.raises(UnsafeZipError, match="at most 3"):
            read_record(source, ours, "byteorder", 3)


def huge(descriptor):
    """An archive with a storage of 5 GB of zeros, its data in no place, as (front, size, parts); zip64 everywhere."""
    payload, size = b"\x80\x02}.", 5 << 30
    flags = 0x0808 if descriptor else 0x0800
    name = b"archive/data/0"
    wide = struct.pack("<2H2Q", 1, 16, size, size)
    sizes = (0, 0) if descriptor else (0xFFFFFFFF, 0xFFFFFFFF)
    front = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, flags, 0, 0, 0, 0 if descriptor else 7, *sizes, len(name), 20)
    front += name + wide
    end = len(front) + size
    tail = struct.pack("<4sI2Q", b"PK\x07\x08", 7, size, size) if descriptor else b""
    pickled = end + len(tail)
    crc, short = zlib.crc32(payload), len(payload)
    second = b"archive/data.pkl"
    tail += (
        struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0x0800, 0, 0, 0, crc, short, short, len(second), 0)
        + second
        + payload
    )
    start = end + len(tail)
    head = struct.Struct("<4s6H3I5H2I")
    top32 = 0xFFFFFFFF
    listing = (
        head.pack(b"PK\x01\x02", 45, 45, flags, 0, 0, 0, 7, top32, top32, len(name), 20, 0, 0, 0, 0, 0) + name + wide
    )
    offset = struct.pack("<2HQ", 1, 8, pickled)
    listing += head.pack(
        b"PK\x01\x02", 45, 45, 0x0800, 0, 0, 0, crc, short, short, len(second), 12, 0, 0, 0, 0, top32
    ) + second + offset  # fmt: skip
    tail += listing
    tail += struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(listing), start)
    tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(listing), 1)
    tail += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, len(listing), top32, 0)
    return Memory(front, end + len(tail), [(end, tail)])


@pytest.mark.parametrize("descriptor", [True, False])
def test_zip64_records(descriptor):
    source = huge(descriptor)
    found = read_archive(source)
    assert found.records["data/0"].size == 5 << 30
    assert found.records["data/0"].offset == 30 + 14 + 20
    assert read_record(source, found, "data.pkl", 100) == b"\x80\x02}."
    assert read_archive(source, local_headers=False).records["data/0"].offset is None


def test_a_sparse_file_of_5_gb_is_what_python_s_zipfile_sees(tmp_path):
    path, source = tmp_path / "model.bin", huge(False)
    with path.open("wb") as file:
        file.write(source.data)
        for start, part in source.sparse:
            file.seek(start)
            file.write(part)
    with zipfile.ZipFile(path) as theirs:
        assert theirs.read("archive/data.pkl") == b"\x80\x02}."
        assert theirs.getinfo("archive/data/0").file_size == 5 << 30
    assert read_bin(path).tensors == {}


def test_a_file_of_5_gb_that_torch_wrote(tmp_path):
    """torch leaves its data out, so that it takes no place on the disk; headers and directory are real."""
    path = tmp_path / "model.bin"
    with torch.serialization.skip_data():
        torch.save({"a": torch.empty(5 << 30, dtype=torch.uint8), "b": torch.empty(70, 3), "c": torch.empty(2)}, path)
    tensors = read_bin(path).tensors
    with zipfile.ZipFile(path) as theirs:
        for key, tensor_ in zip("012", tensors.values(), strict=True):
            info = theirs.getinfo(f"model/data/{key}")
            names = struct.unpack("<2H", read(path, info.header_offset + 26, 4))
            assert tensor_.data.offset == info.header_offset + 30 + sum(names)
            assert tensor_.data.nbytes == info.file_size
    assert tensors["c"].data.offset > 5 << 30


def read(path, offset, count):
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def test_every_changed_bit_is_found():
    """Anywhere in the headers, the directory and the pickle, except in what no reader of a checkpoint looks at."""
    archive_ = read_archive(Memory(CLEAN))
    storage = archive_.records["data/0"]
    free = set(range(storage.offset, storage.offset + storage.size))
    for index in range(4):  # times, versions and attributes
        free |= {local(CLEAN, index) + byte for byte in (4, 5, 10, 11, 12, 13)}
        free |= {central(CLEAN, index) + byte for byte in (4, 5, 6, 7, 12, 13, 14, 15, *range(36, 42))}
    missed = set()
    for place in range(len(CLEAN)):
        for bit in (0, 3, 7):
            source = Memory(changed(CLEAN, (place, bytes([CLEAN[place] ^ 1 << bit]))))
            try:
                found = read_archive(source)
                for name in ("data.pkl", "byteorder", "version"):
                    read_record(source, found, name, 1 << 20)
            except (UnsafeZipError, KeyError):
                continue
            missed.add(place)
    assert missed <= free
