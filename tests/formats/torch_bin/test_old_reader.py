"""torch files from before 1.6: the same tensors as torch reads, nothing executed, every byte accounted for."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from aoconvert.errors import UnsafeFileError, UnsafeZipError
from aoconvert.formats.torch_bin.header import read_bin, read_loadable
from aoconvert.formats.torch_bin.reader import TorchBinReader


def tensors():
    base = torch.arange(60.0).reshape(10, 6)
    linear = torch.nn.Linear(64, 32, bias=False)
    quantize_(linear, Int8WeightOnlyConfig())
    return {
        "float": torch.randn(3, 4),
        "bfloat16": torch.randn(5).bfloat16(),
        "whole": base,
        "column": base[:, 1],
        "transposed": base.t(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "quantized": linear.weight.detach(),
    }


def save(values, path, **options):
    torch.save(values, path, _use_new_zipfile_serialization=False, **options)
    return path.read_bytes()


def elements(content, tensor):
    """A plain tensor of the file, by what was said of it."""
    data, dtype = tensor.data, getattr(torch, tensor.dtype)
    flat = torch.frombuffer(
        bytearray(content[data.offset - data.storage_offset * dtype.itemsize :] + bytes(8)), dtype=torch.uint8
    )
    flat = flat[: len(flat) // 8 * 8].view(dtype)
    return flat.as_strided(tensor.shape, data.stride, data.storage_offset)


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_same_as_in_an_archive(tmp_path, protocol):
    torch.manual_seed(0)
    values = tensors()
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    content = save(values, old, pickle_protocol=protocol)
    torch.save(values, new)
    found, wanted = read_bin(old), read_bin(new)
    assert (found.archive, wanted.archive, found.byteorder) == (False, True, "little")
    assert list(found.tensors) == list(values)
    for name, tensor in found.tensors.items():
        other = wanted.tensors[name]
        assert (tensor.class_name, tensor.dtype, tensor.shape) == (other.class_name, other.dtype, other.shape)
        assert dict(tensor.attributes) == dict(other.attributes)
        for (path, leaf), (_, theirs) in zip(tensor.leaves(), other.leaves(), strict=True):
            assert leaf.data.stride == theirs.data.stride
            live = getattr(values[name], path) if path else values[name].detach()
            assert torch.equal(elements(content, leaf), live)


def test_one_storage_is_there_once(tmp_path):
    base = torch.arange(6.0)
    save({"a": base, "b": base[2:]}, tmp_path / "x.pt")
    found = read_bin(tmp_path / "x.pt").tensors
    assert found["b"].data.offset - found["a"].data.offset == 8
    assert found["a"].data.storage == found["b"].data.storage


def test_read_in_parts_and_not_mapped(tmp_path):
    path = tmp_path / "x.pt"
    save({"state_dict": {"a": torch.arange(12.0).reshape(4, 3)}, "epoch": 3}, path)
    reader = TorchBinReader(path)
    assert torch.equal(reader.read_rows("a", 1, 3), torch.arange(3.0, 9.0).reshape(2, 3))
    reader.close()
    with pytest.raises(UnsafeZipError, match=r"before 1\.6, which cannot be mapped"):
        read_loadable(path)


def test_a_pickle_larger_than_the_first_read(tmp_path):
    values = {f"layer.{i}.{'x' * 100}": torch.full((2,), i) for i in range(12_000)}
    content = save(values, tmp_path / "x.pt")
    found = read_bin(tmp_path / "x.pt").tensors
    assert list(found) == list(values)
    assert torch.equal(elements(content, found[f"layer.11999.{'x' * 100}"]), torch.full((2,), 11999))


class Payload:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"x": torch.ones(2), "y": Payload()}, tmp_path / "x.pt")
    with pytest.raises(UnsafeFileError, match=r"posix\.system is not a name"):
        read_bin(tmp_path / "x.pt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-1], "bytes, .* by what it says of itself"),
        (lambda content: content + b"\0", "bytes, .* by what it says of itself"),
        (lambda content: content[:-16] + bytes(8) + content[-8:], "storage .* has 0 elements, 2 in the pickle"),
        (lambda content: content[: content.index(b"little_endian")], "announced|without a STOP|no end"),
        (lambda content: content.replace(b"M\xe9\x03", b"M\xea\x03", 1), "does not begin as"),
        (lambda content: content.replace(b"FloatStorage", b"LoongStorage", 1), "not a name that a checkpoint may use"),
    ],
)
def test_damaged(tmp_path, change, words):
    path = tmp_path / "x.pt"
    path.write_bytes(change(save({"x": torch.ones(2)}, path)))
    with pytest.raises(UnsafeFileError, match=words):
        read_bin(path)


def test_a_huge_tensor_over_a_small_storage(tmp_path):
    path = tmp_path / "x.pt"
    save({"x": torch.ones(1).expand(1 << 40)}, path)
    with pytest.raises(UnsafeFileError, match="1,099,511,627,776 elements"):
        read_bin(path)


def test_memory_is_that_of_the_pickle(tmp_path):
    """200 MB of storages, of which nothing is read."""
    path = tmp_path / "x.pt"
    save({"x": torch.zeros(200 << 20, dtype=torch.uint8)}, path)
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from aoconvert.formats.torch_bin.header import read_bin\n"
        "print(read_bin(Path(sys.argv[1])).tensors['x'].nbytes, 'torch' in sys.modules)\n"
        "print([int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')][0] // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    first, peak = done.stdout.splitlines()
    assert first == f"{200 << 20} False"
    assert int(peak) < 150


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_read_or_refused(tmp_path_factory, data):
    path: Path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.save(
        {"x": torch.randn(3, 4), "y": torch.nn.Parameter(torch.ones(2))}, buffer, _use_new_zipfile_serialization=False
    )
    content = bytearray(buffer.getvalue())
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[position] = value
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        contents = read_bin(path)
    except UnsafeFileError as error:
        assert "\n" not in error.message
        return
    for tensor in contents.tensors.values():
        assert tensor.data.offset + tensor.nbytes <= path.stat().st_size
