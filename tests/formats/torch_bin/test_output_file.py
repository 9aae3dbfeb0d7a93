"""The file behind the writer: written on where it ended, with the digest it would have had."""

import hashlib
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import quantized

from aoconvert.errors import WriteError
from aoconvert.formats.hashing import Prefix, count_matching
from aoconvert.formats.output_file import OutputFile
from aoconvert.formats.torch_bin.pickle_json import decode, encode
from aoconvert.formats.torch_bin.pickle_tree import Call, Global, Items, Pairs, Storage
from aoconvert.formats.torch_bin.writer import TorchBinWriter

TENSORS = {"a": torch.arange(100.0), "w": quantized("int8wo"), "empty": torch.ones(0), "v": quantized("nvfp4")}


def written(path, names, seal=True):
    with TorchBinWriter(path) as writer:
        stored = []
        for name in names:
            writer.add(name, TENSORS[name])
            stored.append(writer.last())
        sealed = writer.seal() if seal else writer.leave()
        writer._sealed = True  # left as it is
    return stored, sealed


@pytest.mark.parametrize("count", range(len(TENSORS) + 1))
@pytest.mark.parametrize("torn", [b"", b"half a tensor" * 100])
def test_written_on_behind_any_tensor(count, torn, tmp_path):
    """As if it had never stopped; what was torn is cut off."""
    _, whole = written(tmp_path / "whole.bin", TENSORS)
    names = list(TENSORS)
    stored, _ = written(tmp_path / "parts.bin", names[:count], seal=False)
    with (tmp_path / "parts.bin").open("ab") as file:
        file.write(torn)
    found, prefix = count_matching(tmp_path / "parts.bin", [(tensor.size, tensor.sha256) for tensor in stored])
    assert found == count
    if not stored:
        (tmp_path / "parts.bin").unlink()
    with TorchBinWriter(tmp_path / "parts.bin", stored, prefix) as writer:
        for name in names[count:]:
            writer.add(name, TENSORS[name])
        sealed = writer.seal()
    assert (sealed.size, sealed.sha256, sealed.globals) == (whole.size, whole.sha256, whole.globals)
    assert (tmp_path / "parts.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.binary(max_size=300), max_size=8),
    damage=st.none() | st.integers(0, 2000),
    cut=st.none() | st.integers(0, 2000),
)
def test_only_marks_that_the_file_bears_out(tmp_path_factory, parts, damage, cut):
    path = tmp_path_factory.mktemp("marks") / "file"
    content = bytearray(b"".join(parts))
    marks = [(size, hashlib.sha256(content[:size]).hexdigest()) for size in itertools.accumulate(map(len, parts))]
    if damage is not None and damage < len(content):
        content[damage] ^= 1
    path.write_bytes(content[:cut])
    until = min(len(content) if cut is None else cut, len(content))
    good = [size for size, _ in marks if size <= until and not (damage is not None and damage < size)]
    count, prefix = count_matching(path, marks)
    assert count == len(good)
    assert prefix.size == (good[-1] if good else 0)
    assert prefix.digest.hexdigest() == hashlib.sha256(bytes(content[: prefix.size])).hexdigest()


def test_marks_that_run_backwards_are_not_believed(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    marks = [(3, hashlib.sha256(b"abc").hexdigest()), (1, hashlib.sha256(b"a").hexdigest())]
    assert count_matching(tmp_path / "file", marks)[0] == 1


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError):
        OutputFile(tmp_path / "link", Prefix(3))
    stored, _ = written(tmp_path / "a.bin", ["a"], seal=False)
    with pytest.raises(WriteError, match="opening the file failed"):
        TorchBinWriter(tmp_path / "link", stored, Prefix(3))
    assert (tmp_path / "mine").read_bytes() == b"precious"


strings = st.text(st.characters(codec=None, exclude_categories=()), max_size=12)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | strings
lines = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=12)
names = st.builds(Global, lines, lines)
nodes = st.recursive(
    plain | names | st.builds(Storage, names, strings, st.integers(0, 2**62)),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(tuple).map(Items)
        | (pairs := st.lists(st.tuples(inner, inner), max_size=3).map(tuple)).map(Pairs)
        | st.builds(Call, names, st.lists(inner, max_size=3).map(tuple), st.booleans(), pairs, inner)
    ),
    max_leaves=12,
)


def same(one, two):
    """Equal, and of the same types: ``True == 1 == 1.0``."""
    return repr(one) == repr(two)


@settings(max_examples=200, deadline=None)
@given(nodes)
def test_a_node_survives_json(node):
    assert same(decode(json.loads(json.dumps(encode(node)))), node)


json_values = st.recursive(
    plain | st.sampled_from(["tuple", "list", "dict", "global", "storage", "call"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_other_json_is_refused_or_a_node(value):
    try:
        node = decode(value)
    except ValueError:
        return
    assert same(encode(node), value)
