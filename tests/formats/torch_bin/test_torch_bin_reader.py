"""The reader of torch files: exact, in memory of its own, and nothing is unpickled."""

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from aoconvert.errors import AoconvertError, ReadError, SourceError
from aoconvert.formats.torch_bin.reader import TorchBinReader
from aoconvert.formats.torch_bin.writer import TorchBinWriter


def example():
    base = torch.randn(10, 6)
    return {
        "float": torch.randn(3, 4),
        "bfloat16": torch.randn(5).bfloat16(),
        "float8": torch.randn(7).to(torch.float8_e4m3fn),
        "uint16": torch.arange(9).to(torch.uint16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        "transposed": base.t(),
        "row": base[2],
        "column": base[:, 1],
        "expanded": torch.tensor([[1.5]]).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


def check(path, tensors):
    reader = TorchBinReader(path)
    assert list(reader.infos()) == list(tensors)
    content = path.read_bytes()
    for name, tensor in tensors.items():
        info = reader.infos()[name]
        assert (info.dtype, info.shape, info.nbytes) == (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.numel() * tensor.itemsize,
        )
        read = reader.read(name)
        assert type(read) is torch.Tensor
        assert not read.requires_grad
        assert read.is_contiguous()
        assert torch.equal(read.view(torch.uint8) if read.dim() else read, as_bytes(tensor))
        if zipfile.is_zipfile(path) and tensor.is_contiguous():
            stored = content[info.offset : info.offset + info.nbytes]
            assert stored == read.flatten().view(torch.uint8).numpy().tobytes()
    reader.close()
    reader.close()


def as_bytes(tensor):
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint8) if tensor.dim() else tensor


def test_what_torch_saves(tmp_path):
    path = tmp_path / "model.bin"
    torch.save(example(), path)
    check(path, torch.load(path, weights_only=True))


def test_other_forms(tmp_path):
    path = tmp_path / "model.pt"
    for content in ({"state_dict": example(), "epoch": 3}, OrderedDict(example())):
        torch.save(content, path)
        loaded = torch.load(path, weights_only=True)
        check(path, loaded.get("state_dict", loaded))
    old = {name: tensor for name, tensor in example().items() if name not in ("float8", "uint16")}  # newer than that
    torch.save(old, path, _use_new_zipfile_serialization=False)
    check(path, torch.load(path, weights_only=True))


def test_what_our_writer_writes_in_any_order(tmp_path):
    path = tmp_path / "model.bin"
    with TorchBinWriter(path) as writer:
        for name in ("b", "a", "c"):
            writer.add(name, torch.full((3,), ord(name)))
        writer.seal(["c", "b", "a"])
    check(path, {name: torch.full((3,), ord(name)) for name in "cba"})


def test_records_in_another_order_than_torch_writes_them(tmp_path):
    """torch.load(map_location="meta") computes the wrong offsets here: why this reader looks them up."""
    torch.save({"x": torch.zeros(4), "y": torch.ones(4)}, tmp_path / "model.bin")
    path = tmp_path / "shuffled.bin"
    with zipfile.ZipFile(tmp_path / "model.bin") as old, zipfile.ZipFile(path, "w") as new:
        for name in sorted(old.namelist(), reverse=True):
            new.writestr(name, old.read(name))
    check(path, {"x": torch.zeros(4), "y": torch.ones(4)})


def test_a_read_tensor_is_its_own(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"x": torch.ones(4)}, path)
    reader = TorchBinReader(path)
    reader.read("x").zero_()
    assert torch.equal(reader.read("x"), torch.ones(4))
    assert torch.equal(torch.load(path)["x"], torch.ones(4))


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/aoconvert-must-not-exist",)


def refused(path, *words):
    with pytest.raises(SourceError) as caught:
        TorchBinReader(path)
    message = caught.value.message
    assert str(path) in message
    for word in words:
        assert word in message
    assert "\n" not in message
    assert caught.value.hint
    assert "weights_only" not in message + caught.value.hint


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_dict_of_tensors(tmp_path, zipped):
    path = tmp_path / "model.bin"

    def save(content):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)

    save([torch.ones(2)])
    refused(path, "it does not hold a dict")
    save({"step": None, "epoch": 3})
    refused(path, "holds no tensor, but epoch, step")
    save({3: torch.ones(2)})
    refused(path, "the key 3 is not a tensor name")
    save({"x": torch.ones(2).to_sparse()})
    refused(path, "torch._utils._rebuild_sparse_tensor")
    save({"x": torch.ones(2), "y": Payload()})
    refused(path, "posix.system")
    linear = torch.nn.Linear(64, 64, bias=False)
    quantize_(linear, Int8WeightOnlyConfig())
    save({"x": linear.weight.detach()})
    refused(path, "is already quantized: it holds torchao.quantization.Int8Tensor")


def test_quantized_without_torchao(tmp_path):
    path = tmp_path / "model.bin"
    linear = torch.nn.Linear(64, 64, bias=False)
    quantize_(linear, Int8WeightOnlyConfig())
    torch.save({"x": linear.weight.detach()}, path)
    script = (
        "import sys; from pathlib import Path; from aoconvert.errors import SourceError\n"
        "from aoconvert.formats.torch_bin.reader import TorchBinReader\n"
        "assert 'torchao' not in sys.modules\n"
        "try: TorchBinReader(Path(sys.argv[1]))\n"
        "except SourceError as error: print(error.message)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60)
    assert result.stdout == f"{path}: is already quantized: it holds torchao.quantization.Int8Tensor\n"


def test_damaged_files(tmp_path):
    path = tmp_path / "model.bin"
    refused(path, "cannot be opened")
    path.write_bytes(b"")
    refused(path, "0 bytes are too few for a zip archive")
    path.write_bytes(pickle.dumps({"x": 1, "y": bytes(50)}))
    refused(path, "not a zip archive")
    torch.save(example(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, "does not end with its end record: it was cut short")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/text", "x")
    refused(path, "does not belong in a checkpoint that torch.save writes")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"x" * 1000)
    refused(path, "is compressed")


def rewrite(source, target, **changed):
    """A copy of an archive with some records replaced, or left out with None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            record = name.partition("/")[2]
            content = changed.get(record.replace("/", "_"), old.read(name))
            if content is not None:
                new.writestr(name, content)


def test_records_that_do_not_fit(tmp_path):
    path, bad = tmp_path / "model.bin", tmp_path / "bad.bin"
    torch.save({"x": torch.ones(4)}, path)
    rewrite(path, bad, data_0=None)
    refused(bad, "storage 0 is not in the archive")
    rewrite(path, bad, data_0=bytes(15))
    refused(bad, "storage 0 has 15 bytes in the archive, 16 in the pickle")
    rewrite(path, bad, byteorder=b"big")
    refused(bad, "big-endian")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = next(info.header_offset for info in archive.infolist() if info.filename.endswith("data/0"))
    content[start : start + 4] = bytes(4)
    bad.write_bytes(content)
    refused(bad, "has no local header")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"x": torch.ones(1000)}, path)
    reader = TorchBinReader(path)
    os.truncate(path, reader.infos()["x"].offset + 10)
    with pytest.raises(ReadError, match=r"model\.bin: tensor 'x': the file ended after 10 of 4000 bytes"):
        reader.read("x")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_gives_a_valid_read_or_our_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    torch.manual_seed(0)
    torch.save({"x": torch.randn(3, 4), "y": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}, path)
    content = bytearray(path.read_bytes())
    flips = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(flips, min_size=1, max_size=4)):
        content[position] = value
    path.write_bytes(content)
    try:
        reader = TorchBinReader(path)
        for name, info in reader.infos().items():
            assert reader.read(name).nbytes == info.nbytes
        reader.close()
    except AoconvertError as error:
        assert "\n" not in error.message


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """300 MB in ten tensors; resident memory may grow by one or two (glibc keeps a freed one)."""
    path = tmp_path / f"model.{kind}"
    script = f"""
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from aoconvert.engine.memory import steady_allocator
from aoconvert.formats.registry import open_reader
path = Path({str(path)!r})
if not path.exists():
    tensors = {{str(i): torch.full((30 << 20,), i, dtype=torch.uint8) for i in range(10)}}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    sys.exit()
# not ru_maxrss, which starts at the size of whoever started this process
def peak():
    return [int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')][0]
steady_allocator()  # as the engine does: glibc keeps what is freed below its growing threshold
before = peak()
reader = open_reader(path)
for name in reader.infos():
    tensor = reader.read(name)
    assert tensor[0] == tensor[-1] == int(name)
    del tensor
print((peak() - before) / 1024)
"""
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert float(result.stdout) < 100


LEGACY_CALLS = [torch._utils._rebuild_parameter_with_state, torch._tensor._rebuild_from_type_v2, os.system]


@pytest.mark.parametrize("call", LEGACY_CALLS)
def test_an_old_file_holds_what_was_written_then(tmp_path, call):
    """Its pickle is looked at before torch's unpickler makes anything of it."""

    class Later:
        def __reduce__(self):
            return call, ("touch /tmp/aoconvert-must-not-exist", 2, 3, 4)

    path = tmp_path / "model.bin"
    torch.save({"x": torch.ones(2), "y": Later()}, path, _use_new_zipfile_serialization=False)
    refused(path, call.__name__)


def test_an_old_file_of_many_opcodes(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    at = content.rindex(b"\x80\x02}")
    path.write_bytes(content[: at + 2] + b"N" * 2_000_001 + content[at + 2 :])
    refused(path, "more than 2,000,000 opcodes")


def test_a_tensor_that_is_conjugated_when_it_is_read(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"x": torch.ones(2, dtype=torch.complex64).conj()}, path)
    refused(path, "conjugated or negated")
    torch.save({"x": torch.ones(2, dtype=torch.complex64)}, path)
    assert TorchBinReader(path).read("x").dtype == torch.complex64
