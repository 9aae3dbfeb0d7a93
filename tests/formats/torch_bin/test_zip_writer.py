"""The zip writer: Python's zipfile and torch read what it writes; zip64 beyond 4 GiB; the same bytes every time."""

import io
import os
import zipfile
import zlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from aoconvert.formats.torch_bin.pickle_tree import Call, Global, Pairs, Storage, emit
from aoconvert.formats.torch_bin.zip_writer import Entry, ZipStream, archive_size, central_directory, local_header

names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\"), min_size=1, max_size=80)


def write(records):
    parts = []
    stream = ZipStream(parts.append)
    for name, payload in records:
        stream.add(name, payload)
    stream.finish()
    return b"".join(parts)


@given(st.lists(st.tuples(names, st.binary(max_size=300)), unique_by=lambda record: record[0], max_size=8))
def test_zipfile_reads_back_every_record(records):
    archive = write(records)
    assert archive == write(records)
    assert len(archive) == archive_size((name, len(payload)) for name, payload in records)
    with zipfile.ZipFile(io.BytesIO(archive)) as read:
        assert read.testzip() is None
        assert read.namelist() == [name for name, _ in records]
        for name, payload in records:
            assert read.read(name) == payload
            info = read.getinfo(name)
            extra = archive[info.header_offset + 28] | archive[info.header_offset + 29] << 8
            assert (info.header_offset + 30 + len(name) + extra) % 64 == 0
            assert info.date_time == (1980, 1, 1, 0, 0, 0)


def test_a_memoryview_of_a_tensor_is_written_whole():
    data = torch.arange(1000, dtype=torch.int64)
    archive = write([("a/x", data.numpy().data)])
    with zipfile.ZipFile(io.BytesIO(archive)) as read:
        assert read.read("a/x") == data.numpy().tobytes()


def test_more_than_65535_records():
    count = 65600
    archive = write((f"r{i}", b"") for i in range(count))
    with zipfile.ZipFile(io.BytesIO(archive)) as read:
        assert len(read.namelist()) == count


def test_sizes_around_4_gib_use_zip64_exactly_where_a_field_overflows():
    for size in (2**32 - 2, 2**32 - 1, 2**32, 2**33):
        header = local_header(Entry("archive/data/0", size, 7, 0))
        zip64 = size >= 2**32 - 1
        assert int.from_bytes(header[18:22], "little") == int.from_bytes(header[22:26], "little")
        assert int.from_bytes(header[18:22], "little") == min(size, 2**32 - 1)
        assert (b"\x01\x00\x10\x00" + size.to_bytes(8, "little") * 2 in header) == zip64
        assert header[4] == (45 if zip64 else 20)
        assert len(header) % 64 == 0


def sparse_checkpoint(path, sizes):
    """A checkpoint of uint8 zeros whose payloads are holes; torch writes no such file without the disk space."""
    entries = []
    fields = []
    with path.open("wb") as file:

        def record(name, size, payload=None, crc=0):
            entry = Entry("archive/" + name, size, crc, file.tell())
            file.write(local_header(entry))
            if payload is None:
                file.seek(size, os.SEEK_CUR)
            else:
                file.write(payload)
            entries.append(entry)

        for key, size in enumerate(sizes):
            record(f"data/{key}", size)
            storage = Storage(Global("torch", "ByteStorage"), str(key), size)
            hooks = Call(Global("collections", "OrderedDict"), ())
            rebuild = Global("torch._utils", "_rebuild_tensor_v2")
            fields.append((f"t{key}", Call(rebuild, (storage, 0, (size,), (1,), False, hooks))))
        for name, content in (("data.pkl", emit(Pairs(tuple(fields)))), ("byteorder", b"little"), ("version", b"3\n")):
            record(name, len(content), content, zlib.crc32(content))
        file.write(central_directory(entries, file.tell()))
    return entries


def test_an_archive_beyond_4_gib_is_read_by_zipfile_and_torch(tmp_path):
    path = tmp_path / "big.bin"
    sizes = [2**32 + 5, 3, 2**32 - 1]  # an entry too big, and offsets too big for a small and for a big entry
    entries = sparse_checkpoint(path, sizes)
    assert path.stat().st_size == archive_size((entry.name, entry.size) for entry in entries)
    with path.open("r+b") as file:  # a mark at each end of the last tensor
        start = entries[2].offset + len(local_header(entries[2]))
        for position, mark in ((start, b"\x2a"), (start + sizes[2] - 1, b"\x2b")):
            file.seek(position)
            file.write(mark)
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            info = archive.getinfo(entry.name)
            assert (info.file_size, info.compress_size, info.header_offset) == (entry.size, entry.size, entry.offset)
            archive.open(entry.name).close()  # compares the local header with the directory
        assert archive.read("archive/version") == b"3\n"
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert [tensor.numel() for tensor in loaded.values()] == sizes
    assert (loaded["t2"][0].item(), loaded["t2"][1].item(), loaded["t2"][-1].item()) == (0x2A, 0, 0x2B)
