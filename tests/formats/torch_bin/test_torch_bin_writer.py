"""The .bin writer against torch.save: same classes, same bits, same attributes; the same bytes from run to run."""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import CONFIGS, DTYPES, filled, quantized
from torch._weights_only_unpickler import get_globals_in_pkl
from torch.serialization import get_unsafe_globals_in_checkpoint

from aoconvert.errors import WriteError
from aoconvert.formats.content import content_sha256, data_names
from aoconvert.formats.torch_bin.pickle_tree import Call, Global, describe, is_wrapper
from aoconvert.formats.torch_bin.writer import TorchBinWriter


def save(path, tensors, order=None):
    with TorchBinWriter(path) as writer:
        written = [writer.add(name, tensor) for name, tensor in tensors.items()]
        return writer.seal(order), written


def assert_same(ours, theirs):
    """Same class, layout, attributes and bits, all the way down."""
    assert type(ours) is type(theirs)
    if not isinstance(ours, torch.Tensor):
        assert ours == theirs or (ours != ours and theirs != theirs)
        return
    for fact in ("dtype", "device", "shape", "requires_grad", "layout"):
        assert getattr(ours, fact) == getattr(theirs, fact)
    assert ours.stride() == theirs.stride()
    assert list(ours.__dict__) == list(theirs.__dict__)
    for name, value in ours.__dict__.items():
        assert_same(value, theirs.__dict__[name])
    if not is_wrapper(ours):
        assert content_sha256(ours) == content_sha256(theirs)


def through_torch(tensors):
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def check(path, tensors):
    """Everything that must hold for any dict of tensors; returns what was loaded."""
    sealed, written = save(path, tensors)
    content = path.read_bytes()
    assert (sealed.size, sealed.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        pickled = archive.read("archive/data.pkl")
    assert list(sealed.globals) == sorted(get_globals_in_pkl(io.BytesIO(pickled)))
    assert set(sealed.globals) == set().union(*(tensor.globals for tensor in written), [])
    assert get_unsafe_globals_in_checkpoint(path) == []
    expected = through_torch(tensors)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(tensors)
        for name in tensors:
            assert_same(loaded[name], expected[name])
    meta = torch.load(path, weights_only=True, map_location="meta")
    assert [tensor.shape for tensor in meta.values()] == [tensor.shape for tensor in tensors.values()]
    assert TorchBinWriter.outline(tensors).size == sealed.size
    return written


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_tensor(name, tmp_path):
    weight = quantized(name)
    (written,) = check(tmp_path / "a.bin", {"block.weight": weight})
    inner = [getattr(weight, part) for part in written.data_names]
    assert is_wrapper(weight)
    assert written.data_names == tuple(weight.__tensor_flatten__()[0])
    assert written.nbytes == sum(part.numel() * part.element_size() for part in inner)
    assert written.class_name in written.globals
    joined = b"".join(part.contiguous().flatten().view(torch.uint8).numpy().tobytes() for part in inner)
    assert written.sha256 == hashlib.sha256(joined).hexdigest()
    meta = quantized(name, device="meta")
    assert TorchBinWriter.outline({"block.weight": meta}).size == (tmp_path / "a.bin").stat().st_size
    save(tmp_path / "b.bin", {"block.weight": quantized(name)})
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_model_of_every_class_and_its_size_from_meta(tmp_path):
    def model(device):
        tensors = {f"blocks.{name}.weight": quantized(name, device) for name in CONFIGS}
        tensors |= {f"{dtype}": torch.zeros(3, 5, dtype=dtype, device=device) for dtype in DTYPES}
        return tensors

    check(tmp_path / "a.bin", model("cpu"))
    order = sorted(model("meta"))
    sealed, _ = save(tmp_path / "b.bin", model("cpu"), order)
    assert TorchBinWriter.outline(model("meta")).size == (tmp_path / "a.bin").stat().st_size
    assert TorchBinWriter.outline(model("meta"), order).size == sealed.size
    assert list(torch.load(sealed.path, weights_only=True)) == order
    # the dict's order is not the storages': looking up their offsets on meta must still work
    assert list(torch.load(sealed.path, weights_only=True, map_location="meta")) == order
    assert get_unsafe_globals_in_checkpoint(sealed.path) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_dtype(dtype, tmp_path):
    tensors = {"matrix": filled(dtype, 3, 5), "scalar": filled(dtype), "empty": filled(dtype, 0, 4)}
    written = check(tmp_path / "a.bin", tensors)
    assert [tensor.nbytes for tensor in written] == [15 * dtype.itemsize, dtype.itemsize, 0]
    assert {(tensor.class_name, tensor.data_names) for tensor in written} == {("torch.Tensor", ())}
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert TorchBinWriter.outline(meta).size == (tmp_path / "a.bin").stat().st_size


names = st.text(st.characters(codec="utf-8"), max_size=40)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=6), st.randoms())
def test_any_plain_tensors(tmp_path_factory, facts, random):
    path = tmp_path_factory.mktemp("any") / "a.bin"
    tensors = {name: filled(dtype, *shape) for name, (dtype, shape) in facts.items()}
    check(path, tensors)
    order = list(tensors)
    random.shuffle(order)
    sealed, _ = save(path.with_name("b.bin"), tensors, order)
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert sealed.size == TorchBinWriter.outline(meta, order).size
    assert list(torch.load(sealed.path, weights_only=True)) == order


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    base = torch.arange(4000, dtype=torch.float32).reshape(40, 100)
    expanded = torch.ones(1).expand(50)
    _, written = save(tmp_path / "a.bin", {"row": base[3], "column": base[:, 7], "expanded": expanded})
    assert [tensor.nbytes for tensor in written] == [400, 160, 200]
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)
    assert torch.equal(loaded["row"], base[3])
    assert torch.equal(loaded["column"], base[:, 7])
    assert torch.equal(loaded["expanded"], expanded)
    assert written[1].sha256 == content_sha256(base[:, 7].clone())
    meta = torch.empty(40, 100, device="meta")
    views = {"row": meta[3], "column": meta[:, 7], "expanded": torch.ones(1, device="meta").expand(50)}
    assert TorchBinWriter.outline(views).size == (tmp_path / "a.bin").stat().st_size


def test_a_dense_transpose_keeps_its_strides(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).t()
    (written,) = check(tmp_path / "a.bin", {"t": tensor})
    assert torch.load(tmp_path / "a.bin", weights_only=True)["t"].stride() == (1, 4)
    assert written.sha256 == content_sha256(tensor.contiguous())


def test_inner_views_of_a_quantized_tensor(tmp_path):
    weight = quantized("int8wo-group")[16:48]
    assert weight.qdata.untyped_storage().nbytes() > weight.qdata.numel()
    _, (written,) = save(tmp_path / "a.bin", {"w": weight})
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)["w"]
    assert (
        written.nbytes == 32 * 128 + 2 * weight.scale.nbytes // 2 + getattr(weight, "zero_point", loaded.scale).nbytes
    )
    assert torch.equal(loaded.dequantize(), weight.dequantize())


def test_parameters_conjugates_and_attributes(tmp_path):
    tagged = torch.ones(3)
    tagged.note = "kept"
    tensors = {"p": torch.nn.Parameter(torch.randn(2, 3)), "q": torch.nn.Parameter(quantized("int8wo"), False)}
    check(tmp_path / "a.bin", tensors | {"tagged": tagged})
    assert torch.load(tmp_path / "a.bin", weights_only=True)["tagged"].note == "kept"
    conjugate = torch.randn(4, dtype=torch.complex64).conj()
    save(tmp_path / "b.bin", {"c": conjugate})
    assert torch.equal(torch.load(tmp_path / "b.bin", weights_only=True)["c"], conjugate)


def test_long_integers_and_ordered_dicts_in_attributes(tmp_path):
    tagged = torch.ones(1)
    tagged.note = {"ints": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**31) - 1, 2**70], "none": None, "pi": 3.14}
    tagged.more = (OrderedDict(b=1, a=2), torch.Size([2, 3]), torch.strided, torch.int4, (), (1,), (1, 2, 3, 4), True)
    check(tmp_path / "a.bin", {"t": tagged})


def test_shared_and_equal_storages_give_the_same_file(tmp_path):
    one = torch.ones(4)
    save(tmp_path / "a.bin", {"x": one, "y": one})
    save(tmp_path / "b.bin", {"x": torch.ones(4), "y": torch.ones(4)})
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)
    assert loaded["x"].data_ptr() != loaded["y"].data_ptr()


def test_another_process_loads_it_with_only_torchao_imported_and_hashes_agree(tmp_path):
    tensors = {name: quantized(name) for name in ("int8wo", "int8dq", "fp8wo-e4m3", "intx4-sym-PerGroup")}
    sealed, written = save(tmp_path / "a.bin", tensors)
    script = (
        "import sys, json, torch, torchao; d = torch.load(sys.argv[1], weights_only=True, mmap=True);"
        "print(json.dumps({k: [type(v).__module__ + '.' + type(v).__qualname__, float(v.dequantize().double().sum())]"
        " for k, v in d.items()}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(sealed.path)], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = json.loads(result.stdout)
    for tensor in written:
        total = float(tensors[tensor.name].dequantize().double().sum())
        assert loaded[tensor.name] == [tensor.class_name, total]


class Old(Enum):
    """Reduced as Python 3.11.2 reduces every enum."""

    RED = "red"

    def __reduce_ex__(self, protocol):
        return getattr, (type(self), self.name)


def test_enums_are_not_pickled_through_getattr(tmp_path):
    assert describe(Old.RED, store=None) == Call(Global(__name__, "Old"), ("red",))
    sealed, _ = save(tmp_path / "a.bin", {"a": quantized("int8dq"), "b": quantized("fp8wo-e4m3")})
    assert not [name for name in sealed.globals if "getattr" in name]
    assert "torchao.quantization.quant_primitives.MappingType" in sealed.globals


def test_data_names():
    assert data_names(torch.ones(2)) == ()
    assert data_names(torch.nn.Parameter(torch.ones(2))) == ()
    assert "qdata" in data_names(quantized("int8wo"))


def test_an_exception_removes_the_file(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(KeyboardInterrupt), TorchBinWriter(path) as writer:
        writer.add("x", torch.ones(3))
        raise KeyboardInterrupt
    assert not path.exists()
    with TorchBinWriter(path) as writer:  # left without seal
        writer.add("x", torch.ones(3))
    assert not path.exists()


def test_a_sealed_file_survives_an_exception(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(RuntimeError), TorchBinWriter(path) as writer:
        writer.add("x", torch.ones(3))
        writer.seal()
        raise RuntimeError
    assert list(torch.load(path, weights_only=True)) == ["x"]


def test_an_existing_file_is_not_touched(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("mine")
    with pytest.raises(WriteError, match=r"a\.bin: creating the file failed: File exists") as caught:
        TorchBinWriter(path)
    assert caught.value.hint
    assert path.read_text() == "mine"


def test_a_full_disk_names_file_and_tensor(tmp_path):
    path = tmp_path / "a.bin"
    script = f"""
import resource, signal, torch
from pathlib import Path
from aoconvert.errors import WriteError
from aoconvert.formats.torch_bin.writer import TorchBinWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path({str(path)!r})
try:
    with TorchBinWriter(path) as writer:
        writer.add("small", torch.zeros(10))
        try:
            writer.add("big", torch.zeros(100_000))
        except WriteError as error:
            print(error.message, "|", error.hint)
        writer.seal()
except WriteError as error:
    print(error.message)
print(path.exists())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    first, second, exists = result.stdout.splitlines()
    assert first.startswith(f"{path}: writing tensor 'big' failed: {os.strerror(errno.EFBIG)} | free space")
    assert second == f"{path}: a tensor was left half-written"
    assert exists == "False"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_space_left(tmp_path):
    writer = TorchBinWriter(tmp_path / "a.bin")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file.fileno())
    os.close(full)
    with pytest.raises(WriteError, match="writing tensor 'x' failed: No space left on device") as caught:
        writer.add("x", torch.ones(3))
    assert "free space" in caught.value.hint
    writer.abort()
    assert not (tmp_path / "a.bin").exists()


def test_a_tensor_that_cannot_be_stored(tmp_path):
    class Local:
        pass

    tagged = torch.ones(3)
    tagged.note = Local()
    meta = torch.ones(3, device="meta")
    for tensor, reason in ((tagged, "not defined at module level"), (meta, "on the meta device")):
        with TorchBinWriter(tmp_path / "a.bin") as writer, pytest.raises(WriteError, match=reason) as caught:
            writer.add("layer.weight", tensor)
        assert "tensor 'layer.weight'" in caught.value.message
    tagged.note = (part for part in "ab")
    with pytest.raises(WriteError, match=r"a builtins\.generator cannot be pickled"):
        TorchBinWriter.outline({"x": tagged})


def test_wrong_names(tmp_path):
    with TorchBinWriter(tmp_path / "a.bin") as writer:
        writer.add("x", torch.ones(3))
        with pytest.raises(WriteError, match="'x' was written twice"):
            writer.add("x", torch.ones(3))
        for order in (["x", "y"], [], ["x", "x"]):
            with pytest.raises(WriteError, match="the order names other tensors"):
                writer.seal(order)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Twelve tensors of 32 MB through a writer that must not keep any of them."""
    script = f"""
import resource, torch
from pathlib import Path
from aoconvert.formats.torch_bin.writer import TorchBinWriter
with TorchBinWriter(Path({str(tmp_path / "a.bin")!r})) as writer:
    for index in range(12):
        writer.add(str(index), torch.full((32 << 20,), index, dtype=torch.uint8))
        if index == 1:
            # not ru_maxrss, which starts at the size of whoever started this process
            def peak():
                return [int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')][0]
            before = peak()
    writer.seal()
print((peak() - before) / 1024)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert float(result.stdout) < 16
