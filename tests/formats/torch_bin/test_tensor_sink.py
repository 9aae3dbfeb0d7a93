"""A tensor written by rows: the same file as a tensor added whole; what does not fit is refused."""

import hashlib
import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import CONFIGS, DTYPES, filled, quantized

from aoconvert.errors import WriteError
from aoconvert.formats import hashing, output_file
from aoconvert.formats.content import data_names
from aoconvert.formats.torch_bin.writer import TorchBinWriter


def pieces(tensor, cuts):
    """Contiguous blocks of rows, some of them views into larger memory."""
    edges = sorted({0, tensor.shape[0], *(cut % (tensor.shape[0] + 1) for cut in cuts)})
    return [tensor[start:stop] for start, stop in itertools.pairwise(edges)]


def stream(writer, name, tensor, like, cuts):
    parts = {part: getattr(tensor, part) for part in data_names(tensor)} or {"": tensor}
    first, *rest = parts
    sink = writer.begin(name, like)
    for rows in pieces(parts[first], cuts):
        sink.put(rows)
    return sink.finish({part: parts[part] for part in rest})


def both(folder, tensors, cuts=(), likes=None):
    """The same tensors added whole and by rows; returns the two paths, asserting that all that is said agrees."""
    with TorchBinWriter(folder / "whole.bin") as writer:
        whole = [(writer.add(name, tensor), writer.last()) for name, tensor in tensors.items()]
        sealed = writer.seal()
    with TorchBinWriter(folder / "rows.bin") as writer:
        rows = []
        for name, tensor in tensors.items():
            like = likes[name] if likes else tensor.to("meta")
            rows.append((stream(writer, name, tensor, like, cuts), writer.last()))
        other = writer.seal()
    assert whole == rows
    assert (sealed.size, sealed.sha256, sealed.globals) == (other.size, other.sha256, other.globals)
    one, two = (folder / "whole.bin").read_bytes(), (folder / "rows.bin").read_bytes()
    assert one == two
    assert hashlib.sha256(one).hexdigest() == sealed.sha256
    for name in ("whole.bin", "rows.bin"):
        (folder / name).unlink()


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("intx") or "-PerGroup" in name])
def test_a_quantized_tensor_by_rows(name, tmp_path):
    """``like`` is made by torchao on the meta device, where no value is known."""
    tensors = {"small": filled(torch.float32, 3), "w": quantized(name)}
    both(tmp_path, {"w": tensors["w"]}, [5, 17, 40], {"w": quantized(name, "meta")})


near = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]) | st.integers(0, 700)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@settings(max_examples=60, deadline=None)
@given(
    before=near,
    rows=st.integers(0, 70),
    columns=st.lists(st.sampled_from([0, 1, 2, 3, 63, 64, 65]), max_size=2),
    dtype=st.sampled_from(DTYPES),
    cuts=st.lists(st.integers(0, 70), max_size=6),
    name=st.text(st.characters(codec="utf-8"), max_size=90),
)
def test_any_plain_tensor_by_rows(tmp_path_factory, before, rows, columns, dtype, cuts, name):
    """Whatever lies before it, and at whatever offset its record starts."""
    folder = tmp_path_factory.mktemp("rows")
    with TorchBinWriter(folder / "whole.bin") as writer:
        writer.add("0", filled(torch.uint8, before))
        tensor = filled(dtype, rows, *columns)
        expected = writer.add("1" + name, tensor)
        writer.add("2", filled(torch.uint8, 0))
        writer.seal()
    with TorchBinWriter(folder / "rows.bin") as writer:
        writer.add("0", torch.load(folder / "whole.bin", weights_only=True)["0"])
        assert stream(writer, "1" + name, tensor, tensor.to("meta"), cuts) == expected
        writer.add("2", filled(torch.uint8, 0))
        writer.seal()
    assert (folder / "whole.bin").read_bytes() == (folder / "rows.bin").read_bytes()


def test_files_larger_than_the_write_behind_window(tmp_path, monkeypatch):
    monkeypatch.setattr(output_file, "_WINDOW", 1 << 12)
    monkeypatch.setattr(hashing, "_CHUNK", 1 << 10)
    both(tmp_path, {"a": filled(torch.int8, 300, 100), "b": filled(torch.bfloat16, 9, 5000)}, [1, 2, 100, 256])


class Sparse:
    """Takes writes of zeros as holes, so that 4 GiB cost no disk."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, view):
        if len(view) < 1 << 20:
            return self.file.write(view)
        self.file.truncate(self.file.seek(len(view), os.SEEK_CUR))
        return len(view)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2**32 - 2, 2**32 - 1, 2**32 + 1])
def test_sizes_around_4_gib_by_rows(size, tmp_path):
    """The zip64 header is 20 bytes longer: the gap must be, too. Zeros that share 256 MB of memory."""
    block = torch.zeros(1 << 28, dtype=torch.uint8)
    digests = []
    for name, by_rows in (("rows.bin", True), ("whole.bin", False)):
        with TorchBinWriter(tmp_path / name) as writer:
            writer._file._file = Sparse(writer._file._file)
            if by_rows:
                sink = writer.begin("w", torch.empty(size, dtype=torch.uint8, device="meta"))
                for start in range(0, size, len(block)):
                    sink.put(block[: min(len(block), size - start)])
                written = sink.finish({})
            else:
                written = writer.add("w", torch.zeros(size, dtype=torch.uint8))
            writer.add("last", torch.ones(3))
            sealed = writer.seal()
        digests.append((written, sealed.size, sealed.sha256))
        (tmp_path / name).unlink()
    assert digests[0] == digests[1]


def test_what_does_not_fit_is_refused(tmp_path):
    weight = quantized("int8wo")
    cases = [
        (lambda sink: sink.put(weight.qdata[:, :4].contiguous()), r"rows of torch\.int8 \[64, 4\]"),
        (lambda sink: sink.put(weight.qdata.t()[:3]), "rows of"),
        (lambda sink: sink.put(weight.qdata.float()), r"rows of torch\.float32"),
        (lambda sink: (sink.put(weight.qdata), sink.put(weight.qdata[:1])), r"rows of torch\.int8 \[1, 128\]"),
        (lambda sink: (sink.put(weight.qdata[:63]), sink.finish({})), "only 63 rows"),
        (lambda sink: (sink.put(weight.qdata), sink.finish({})), r"inner tensors \[\]"),
        (
            lambda sink: (
                sink.put(weight.qdata),
                sink.finish({"scale": torch.ones(1), "zero_point": weight.zero_point}),
            ),
            r"scale of torch\.float32 \[1\]",
        ),
    ]
    for number, (wrong, reason) in enumerate(cases):
        with TorchBinWriter(tmp_path / f"{number}.bin") as writer, pytest.raises(WriteError, match=reason) as caught:
            wrong(writer.begin("w", quantized("int8wo", "meta")))
        assert "tensor 'w' of [64, 128] got" in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_stored_row_by_row(tmp_path):
    transposed = torch.empty(4, 3, device="meta").t()
    scalar = torch.empty((), device="meta")
    for like in (transposed, scalar):
        with TorchBinWriter(tmp_path / "a.bin") as writer, pytest.raises(WriteError, match="cannot be written by rows"):
            writer.begin("w", like)


def test_nothing_else_while_rows_are_missing(tmp_path):
    with TorchBinWriter(tmp_path / "a.bin") as writer:
        sink = writer.begin("w", torch.empty(4, 3, device="meta"))
        sink.put(torch.ones(2, 3))
        for wrong in (lambda: writer.add("x", torch.ones(1)), lambda: writer.begin("y", torch.ones(1)), writer.seal):
            with pytest.raises(WriteError, match="a tensor was left half-written"):
                wrong()
        with pytest.raises(WriteError, match="'w' was written twice"):
            sink.put(torch.ones(2, 3))
            sink.finish({})
            writer.begin("w", torch.empty(4, 3, device="meta"))
    assert not (tmp_path / "a.bin").exists()
