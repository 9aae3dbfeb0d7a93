"""Several files as one mapping."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aoconvert.errors import SourceError
from aoconvert.formats.registry import open_reader
from aoconvert.formats.sharded import CheckpointReader


@pytest.fixture
def folder(tmp_path):
    save_file({"z": torch.ones(2), "a": torch.ones(3, dtype=torch.float64)}, tmp_path / "one.safetensors")
    torch.save({"m": torch.full((2,), 5.0), "b": torch.full((4,), 6.0)}, tmp_path / "two.bin")
    (tmp_path / "deep").mkdir()
    torch.save({"k": torch.full((1,), 7.0)}, tmp_path / "deep" / "three.pt")
    return tmp_path


FILES = ["two.bin", "one.safetensors", "deep/three.pt"]


def opened(folder):
    links = (fd.resolve() for fd in Path("/proc/self/fd").iterdir())
    return [link.name for link in links if link.is_relative_to(folder)]


def test_all_kinds_as_one(folder):
    reader = CheckpointReader(folder, FILES)
    infos = reader.infos()
    assert {name: info.file for name, info in infos.items()} == {
        **dict.fromkeys("mb", FILES[0]), **dict.fromkeys("az", FILES[1]), "k": FILES[2],
    }  # fmt: skip
    names = sorted(infos, key=lambda name: (FILES.index(infos[name].file), infos[name].offset))
    for name in (*names, *reversed(names)):
        tensor = reader.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (infos[name].dtype, infos[name].shape)
    assert torch.equal(reader.read("b"), torch.full((4,), 6.0))
    reader.close()
    assert torch.equal(reader.read("k"), torch.full((1,), 7.0))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_the_four_files_that_were_read_last_are_open(folder):
    for name in "pqrst":
        save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    torch.save({"old": torch.zeros(1)}, folder / "old.bin", _use_new_zipfile_serialization=False)
    reader = CheckpointReader(folder, [*FILES, "old.bin", *(f"{name}.safetensors" for name in "pqrst")])
    assert opened(folder) == []
    seen = []
    for name in ("m", "z", "m", "p", "q", "z", "r", "s", "t", "p"):
        file = reader.infos()[name].file
        seen = [*(other for other in seen if other != file), file][-4:]
        assert reader.read(name).numel() > 0
        assert sorted(opened(folder)) == sorted(seen)
    # what is in memory as a whole is not kept beside others
    assert reader.read("old").item() == 0
    assert opened(folder) == ["old.bin"]
    reader.close()
    assert opened(folder) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_two_files_in_turn_are_opened_once(folder):
    reader = CheckpointReader(folder, FILES)
    reader.read("m")
    reader.read("z")
    before = {fd.name: fd.resolve().name for fd in Path("/proc/self/fd").iterdir()}
    (folder / "one.safetensors").unlink()
    for _ in range(3):
        assert torch.equal(reader.read("b"), torch.full((4,), 6.0))
        assert torch.equal(reader.read("z"), torch.ones(2))
    after = {fd.name: fd.resolve().name for fd in Path("/proc/self/fd").iterdir()}
    assert {fd for fd, name in before.items() if name == "two.bin"} == {
        fd for fd, name in after.items() if name == "two.bin"
    }
    reader.close()


def test_a_name_in_two_files(folder):
    torch.save({"z": torch.zeros(9), "new": torch.zeros(1)}, folder / "four.bin")
    files = [*FILES, "four.bin"]
    with pytest.raises(SourceError, match=r"'z' is in both one\.safetensors and four\.bin") as caught:
        CheckpointReader(folder, files)
    assert caught.value.hint
    for file, length in (("four.bin", 9), ("one.safetensors", 2)):
        reader = CheckpointReader(folder, files, {"z": file})
        assert reader.infos()["z"].shape == (length,)
        assert "new" in reader.infos()
        assert len(reader.read("z")) == length


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ({"m": "six.bin"}, "the index puts tensor 'm' in six.bin, which is not among the checkpoint's files"),
    ],
)
def test_an_index_that_does_not_fit(folder, index, what):
    with pytest.raises(SourceError) as caught:
        CheckpointReader(folder, FILES, index)
    assert what in caught.value.message
    assert caught.value.hint


def test_unknown_and_missing_files(folder):
    with pytest.raises(SourceError, match=r"model\.npz: unknown type of weights file"):
        open_reader(folder / "model.npz")
    with pytest.raises(SourceError, match=r"none\.safetensors: cannot be opened"):
        CheckpointReader(folder, ["none.safetensors"])
