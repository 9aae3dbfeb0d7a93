"""The safetensors reader against the reference library; damaged files give our errors and nothing else."""

import json
import math

import pytest
import torch
from helpers.bits import same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as reference_load
from safetensors.torch import save as reference_save

from aoconvert.errors import ReadError, SourceError
from aoconvert.formats.safetensors import header
from aoconvert.formats.safetensors.reader import SafetensorsReader, torch_dtype

DTYPES = {name: torch_dtype(name) for name in header.DTYPES}

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
facts = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=20), st.tuples(st.sampled_from(list(DTYPES)), shapes)
)


def filled(dtype, shape):
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@settings(max_examples=60, deadline=None)
@given(facts)
def test_reads_what_the_library_writes(tmp_path_factory, facts):
    facts.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    tensors = {name: filled(DTYPES[dtype], shape) for name, (dtype, shape) in facts.items()}
    path.write_bytes(reference_save(tensors, {"format": "pt"}))
    reader = SafetensorsReader(path)
    assert reader.infos().keys() == tensors.keys()
    content = path.read_bytes()
    for name, tensor in tensors.items():
        info = reader.infos()[name]
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        stored = content[info.offset : info.offset + info.nbytes]
        assert stored == tensor.flatten().view(torch.uint8).numpy().tobytes()
        read = reader.read(name)
        assert same(read, tensor)
        assert read.untyped_storage().nbytes() == tensor.nbytes
        if tensor.dim():
            assert same(
                reader.read_rows(name, 1 if len(tensor) > 1 else 0, len(tensor)), tensor[1 if len(tensor) > 1 else 0 :]
            )
    reader.close()
    reader.close()


def test_every_dtype_of_the_library(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {name: filled(dtype, (3, 2)) for name, dtype in DTYPES.items()}
    path.write_bytes(reference_save(tensors))
    reader = SafetensorsReader(path)
    assert {info.name: info.dtype for info in reader.infos().values()} == DTYPES
    for name, tensor in tensors.items():
        assert same(reader.read(name), tensor)


@pytest.mark.parametrize("rows", [(-1, 1), (2, 1), (0, 4)])
def test_rows_out_of_range(tmp_path, rows):
    path = tmp_path / "model.safetensors"
    path.write_bytes(reference_save({"x": torch.ones(3, 2)}))
    with pytest.raises(IndexError, match="'x', which has 3"):
        SafetensorsReader(path).read_rows("x", *rows)


FAULTS = {
    "truncated: a safetensors file has at least 8 bytes, this one has 3": b"abc",
    "is not a safetensors file: its header would be 506097522914230528 bytes long": bytes(range(12)),
    "truncated: the header ends at byte 1008, the file has 10": (1000).to_bytes(8, "little") + b"{}",
    "its header is not valid JSON": raw(b"{"),
    "its header is not valid JSON ": raw(b"[" * 100_000),
    "its header is not valid JSON  ": raw(b'{"x": ' + b"1" * 5000 + b"}"),
    "its header is not valid JSON   ": raw(b'{"\xff": 1}'),
    "its header is not a JSON object": raw([]),
    "its header names 'x' twice": raw(b'{"x": 1, "x": 1}'),
    "its __metadata__ is not a table of strings": raw({"__metadata__": {"a": 1}}),
    "tensor 'x': its header entry is not a JSON object": raw({"x": 1}),
    "tensor 'x': its header entry has no data_offsets": raw({"x": {"dtype": "F32", "shape": [2]}}),
    "tensor 'x': unknown dtype 'F12'": raw({"x": entry("F12")}, bytes(8)),
    "tensor 'x': unknown dtype ['F32']": raw({"x": entry(["F32"])}),
    "tensor 'x': its shape is not a list": raw({"x": entry(shape=[2.0])}),
    "tensor 'x': its shape is not a list ": raw({"x": entry(shape=[True])}),
    "tensor 'x': its shape is not a list  ": raw({"x": entry(shape=[-1])}),
    "tensor 'x': its shape is not a list   ": raw({"x": entry(shape=[1] * 65)}),
    "tensor 'x': its shape [0, 4611686018427387904, 4] is too large": raw({"x": entry(shape=[0, 2**62, 4])}),
    "tensor 'x': its data_offsets are not two byte offsets": raw({"x": entry(offsets=[0])}),
    "tensor 'x': F32 of shape [2] takes 8 bytes, its data_offsets span 4": raw({"x": entry(offsets=[0, 4])}),
    "tensor 'x': F32 of shape [2] takes 8 bytes, its data_offsets span -8": raw({"x": entry(offsets=[8, 0])}),
    "tensor 'y': its data overlaps the tensor before it": raw({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
    "tensor 'y': 2 bytes before its data belong to no tensor": raw(
        {"x": entry(), "y": entry(offsets=[10, 18])}, bytes(18)
    ),
    "is truncated: the header promises 77 bytes, the file has 76": raw({"x": entry()}, bytes(7)),
    "has 1 bytes after its last tensor that belong to no tensor": raw({"x": entry()}, bytes(9)),
    "its name is not valid Unicode": raw(rb'{"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
}


@pytest.mark.parametrize("what", FAULTS)
def test_each_fault_has_its_line(what, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(FAULTS[what])
    with pytest.raises(SourceError) as caught:
        SafetensorsReader(path)
    assert str(path) in caught.value.message
    assert what.strip() in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(SourceError, match="cannot be opened: No such file or directory"):
        SafetensorsReader(tmp_path / "no.safetensors")
    with pytest.raises(SourceError, match="is not a file"):
        SafetensorsReader(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(reference_save({"x": torch.ones(100)}))
    reader = SafetensorsReader(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 40)
    with pytest.raises(ReadError, match=r"model\.safetensors: tensor 'x': the file ended after 360 of 400 bytes"):
        reader.read("x")


GOOD = reference_save({"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int8)}, {"k": "v"})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(GOOD)),
)
def test_any_damage_gives_a_valid_read_or_our_error(tmp_path_factory, flips, length):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    content = bytearray(GOOD)
    for position, value in flips:
        content[position] = value
    path.write_bytes(content[:length])
    try:
        reader = SafetensorsReader(path)
    except SourceError as error:
        assert "\n" not in error.message
        return
    for name, tensor in reference_load(bytes(content[:length])).items():  # what we accept, the library accepts
        assert same(reader.read(name), tensor)
    reader.close()


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "U8", "x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    ),
    st.binary(max_size=16),
)
def test_any_header_gives_a_valid_read_or_our_error(tmp_path_factory, header, data):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(raw(header, data))
    try:
        reader = SafetensorsReader(path)
    except SourceError:
        return
    assert sum(reader.read(name).nbytes for name in reader.infos()) == len(data)
    reader.close()
