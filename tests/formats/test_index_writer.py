"""The shard index."""

import json

import pytest

from aoconvert.errors import WriteError
from aoconvert.formats.index import write_index


def test_what_loaders_expect(tmp_path):
    path = tmp_path / "model.bin.index.json"
    write_index(path, {"b": "two.bin", "a": "one.bin"}, 12)
    first = path.read_bytes()
    assert json.loads(first) == {"metadata": {"total_size": 12}, "weight_map": {"a": "one.bin", "b": "two.bin"}}
    assert list(json.loads(first)["weight_map"]) == ["a", "b"]
    write_index(path, {"a": "one.bin", "b": "two.bin"}, 12)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "index.json").mkdir()
    with pytest.raises(WriteError, match=r"index\.json: writing the index failed") as caught:
        write_index(tmp_path / "index.json", {}, 0)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_a_missing_folder(tmp_path):
    with pytest.raises(WriteError, match="No such file or directory"):
        write_index(tmp_path / "no" / "index.json", {}, 0)
