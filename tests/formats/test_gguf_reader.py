"""The reader of GGUF files: what gguf itself reads, and damaged files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers import gguf_files
from hypothesis import given
from hypothesis import strategies as st

from aoconvert.errors import SourceError
from aoconvert.formats.gguf.header import read_header
from aoconvert.formats.gguf.reader import GgufReader

KINDS = [kind for kind in gguf.quants._type_traits if kind.name != "BF16"]


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    tensors: tuple[bytes, ...] = (), keys: tuple[bytes, ...] = (), version: int = 3, counts: Any = None
) -> bytes:
    counted = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", version, *counted) + b"".join((*keys, *tensors))


ONE = (tensor(b"a", (8, 2), 0, 0),)
DATA = bytes(256)
BAD = {
    "magic": (b"GGML" + bytes(300), "is truncated or not a GGUF file"),
    "empty": (b"", "is truncated or not a GGUF file"),
    "version": (header(version=1) + DATA, "version 1; 2 and 3 are read"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + DATA, "is a big-endian GGUF file"),
    "tensors": (header(counts=(1 << 40, 0)) + DATA, "announces 1,099,511,627,776 tensors"),
    "values": (header(counts=(0, 1 << 40)) + DATA, "announces 0 tensors and 1,099,511,627,776 values"),
    "long string": (header(keys=(key(b"k", 8, struct.pack("<Q", 1 << 60)),)) + DATA, "is truncated"),
    "long array": (header(keys=(key(b"k", 9, struct.pack("<IQ", 6, 1 << 60)),)) + DATA, "is truncated"),
    "many strings": (header(keys=(key(b"k", 9, struct.pack("<IQ", 8, 1 << 60)),)) + DATA, "an array of"),
    "nested": (header(keys=(key(b"k", 9, struct.pack("<IQ", 9, 1) * 9),)) + DATA, "nested arrays"),
    "value type": (header(keys=(key(b"k", 77, bytes(8)),)) + DATA, "a value of type 77"),
    "key twice": (header(keys=(key(b"k", 0, b"\1"), key(b"k", 0, b"\1"))) + DATA, "it has the key 'k' twice"),
    "not UTF-8": (header(keys=(key(b"\xff", 0, b"\1"),)) + DATA, "is not UTF-8"),
    "alignment": (header(ONE, (key(b"general.alignment", 4, struct.pack("<I", 3)),)) + DATA, "its alignment is 3"),
    "no dimensions": (header((tensor(b"a", (), 0, 0),)) + DATA, "has 0 dimensions"),
    "many dimensions": (header((tensor(b"a", (1,) * 65, 0, 0),)) + DATA, "has 65 dimensions"),
    "zero": (header((tensor(b"a", (8, 0), 0, 0),)) + DATA, "has the shape [0, 8]"),
    "absurd shape": (header((tensor(b"a", (1 << 40, 1 << 40), 0, 0),)) + DATA, "has the shape"),
    "name twice": (header((*ONE, tensor(b"a", (8,), 0, 128))) + DATA, "tensor 'a' is there twice"),
    "type": (header((tensor(b"a", (32,), 99, 0),)) + DATA, "tensor 'a' has the type 99, which gguf"),
    "part of a block": (header((tensor(b"a", (33,), int(Kind.Q8_0), 0),)) + DATA, "has rows of 33"),
    "behind the end": (header((tensor(b"a", (8, 2), 0, 1 << 20),)) + DATA, "is truncated: tensor 'a' ends at byte"),
    "absurd offset": (header((tensor(b"a", (8, 2), 0, (1 << 64) - 32),)) + DATA, "is truncated: tensor 'a'"),
    "overlap": (header((*ONE, tensor(b"b", (8,), 0, 32))) + DATA, "tensors 'a' and 'b' overlap"),
    "cut short": ((header(ONE) + DATA)[:60], "is truncated"),
    "split": (
        header(ONE, (key(b"split.count", 2, struct.pack("<H", 3)),)) + DATA,
        "is one of 3 files into which a model was split",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_damaged_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, problem = BAD[case]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(SourceError) as caught:
        GgufReader(tmp_path / "m.gguf")
    assert problem in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_are_what_gguf_makes_of_the_whole(kind: Kind, tmp_path: Path) -> None:
    from aoconvert.models.base import SourceTensor
    from aoconvert.originals.gguf import Blocks, _shape

    stored = gguf_files.blocks((5, 512), kind, 0)
    file = gguf_files.write(tmp_path / "m.gguf", "any", {}, {"a": (stored, kind)})
    expected = torch.from_numpy(gguf.quants.dequantize(stored, kind))
    reader = GgufReader(file)
    info = reader.infos()["a"]
    assert np.array_equal(reader.read("a").numpy(), gguf.GGUFReader(file).tensors[0].data)
    source = SourceTensor(str(file), "a", info.dtype, info.shape, info.nbytes, packing=info.packing)
    assert _shape(source) == (5, 512)

    def load(tensor: SourceTensor, rows: tuple[int, int] | None) -> torch.Tensor:
        return reader.read(tensor.name) if rows is None else reader.read_rows(tensor.name, *rows)

    for rows in ((0, 5), (1, 4), (4, 5)):
        made = Blocks(source).make(rows, load)
        assert torch.equal(made.view(torch.int32), expected[slice(*rows)].view(torch.int32))
    reader.close()


class Bytes:
    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read(self, offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= self.size
        return self._data[offset : offset + count]


WHOLE = (
    header(
        (tensor(b"a", (8, 2), 0, 0), tensor(b"b", (32,), int(Kind.Q8_0), 64)),
        (
            key(b"general.architecture", 8, string(b"llama")),
            key(b"t", 9, struct.pack("<IQ", 8, 2) + string(b"x") + string(b"yz")),
            key(b"n", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 3)),
        ),
    )
    + DATA
)


def test_values_and_places(tmp_path: Path) -> None:
    found = read_header(Bytes(WHOLE), "m.gguf")
    assert found.architecture == "llama"
    assert found.values == {"general.architecture": "llama", "t": None, "n": (1.0, 2.0, 3.0)}
    assert found.entries["a"].shape == (2, 8)
    assert found.entries["b"].begin - found.entries["a"].begin == 64
    assert read_header(Bytes(WHOLE), "m.gguf", found) is found


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=8), st.integers(0, len(WHOLE)))
def test_any_bytes_give_a_header_or_an_error(place: int, data: bytes, length: int) -> None:
    damaged = (WHOLE[:place] + data + WHOLE[place + len(data) :])[:length]
    try:
        read_header(Bytes(damaged), "m.gguf")
    except SourceError as error:
        assert "\n" not in error.message
