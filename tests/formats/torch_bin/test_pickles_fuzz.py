"""Fuzz: whatever the bytes, the readers give contents or our own error, soon and in little memory.

``tests/fixtures/fuzz`` keeps the inputs that reached something new or once went wrong; they are run first.
"""

import io
import math
import time
import tracemalloc
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torchao.quantization  # noqa: F401 - registers its classes
from hostile_pickles import STOP, archive, call, name, number, structure_cases, tensor, text, top, tup, wrapper
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aoconvert.errors import UnsafeFileError
from aoconvert.formats.torch_bin.contents import BinContents
from aoconvert.formats.torch_bin.header import read_contents, read_source
from aoconvert.formats.torch_bin.pickle_reader import _HANDLERS, MAX_OPCODES
from aoconvert.formats.torch_bin.safe_names import ITEMSIZE, list_names
from aoconvert.formats.torch_bin.zip_reader import Record

FIXTURES = Path(__file__).parents[2] / "fixtures"
CORPUS = sorted((FIXTURES / "fuzz").glob("*"))
SEEDS = ["torchao-0.6.1/float8dq_e4m3_perrow", "torchao-0.17.0/int8dq_v2", "torchao-0.10.0/uint3wo_g64"]
RECORDS = {"0": Record("data/0", 0, 64, 16, 0, 0, 100)}
QUICK = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


class Memory:
    def __init__(self, data):
        self.data, self.size = data, len(data)

    def read(self, offset, count):
        assert min(offset, count) >= 0 and offset + count <= self.size
        return self.data[offset : offset + count]


def attempt(read):
    """Contents, or None for our own error; anything else fails the test."""
    start = time.thread_time()
    try:
        contents = read()
    except UnsafeFileError as error:
        assert error.message.isprintable()
        assert len(error.message) < 600
        contents = None
    assert time.thread_time() - start < 5
    if contents is not None:
        assert isinstance(contents, BinContents)
        for tensor_ in contents.tensors.values():
            for _, leaf in tensor_.leaves():
                info = contents.storages[leaf.data.storage]
                if leaf.data.offset is not None and leaf.data.nbytes:
                    steps = zip(leaf.shape, leaf.data.stride, strict=True)
                    span = 1 + sum((length - 1) * step for length, step in steps)
                    assert info.offset <= leaf.data.offset
                    assert leaf.data.offset + span * ITEMSIZE[leaf.dtype] <= info.offset + info.size
    return contents


@cache
def seeds():
    return [next((FIXTURES / "legacy" / seed).glob("*.bin")).read_bytes() for seed in SEEDS] + [
        archive(top(tensor())),
        archive(top(wrapper())),
    ]


@st.composite
def mutated(draw, originals):
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 4)):
            case 0:
                data[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[place:place] = draw(st.binary(max_size=8))
            case 2:
                del data[place : place + draw(st.integers(1, 40))]
            case 3:
                data[place : place + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"]))
            case 4:
                other = draw(st.integers(0, len(data)))
                data[place:place] = data[other : other + draw(st.integers(1, 60))]
    return bytes(data)


@cache
def pickles():
    found = [top(tensor()), top(wrapper())]
    for data in seeds()[:3]:
        start = data.index(b"\x80\x02")
        found.append(data[start : data.index(b"PK\x07\x08", start)])
    quick = {
        case: pickled for case, (pickled, _) in structure_cases().items() if "bomb" not in case and "laughs" not in case
    }
    return found + [pickled for pickled in quick.values() if len(pickled) < 2000]


SIMPLE = [
    b"N",
    b"\x88",
    b")",
    b"]",
    b"}",
    b"\x8f",
    number(0),
    number(4),
    text("a"),
    text("storage"),
    text("cpu"),
    text("0"),
]
NAMES = [name(dotted) for dotted in sorted(list_names())[::7]] + [
    name(dotted)
    for dotted, known in list_names().items()
    if not dotted.startswith("torchao") and known.kind.name not in ("DTYPE", "STORAGE")
]
WHOLE = [tensor(), wrapper(), tup(number(4)), call("torch.Size", tup(number(2))), call("torch.device", text("cpu"))]
OPCODES = [bytes([code]) for code in _HANDLERS] + [
    b"q\x00",
    b"h\x00",
    b"q\x01",
    b"h\x01",
    b"(",
    b"t",
    b"R",
    b"b",
    b"\x81",
]
programs = st.lists(st.sampled_from(SIMPLE + NAMES + WHOLE + OPCODES), max_size=60).map(
    lambda parts: b"\x80\x02" + b"".join(parts) + STOP
)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(path):
    data = path.read_bytes()
    attempt(lambda: read_contents(data, RECORDS))
    attempt(lambda: read_source(Memory(data), "x"))
    attempt(lambda: read_source(Memory(data), "x", local_headers=False))


@QUICK
@given(st.binary(max_size=300))
def test_random_pickles(data):
    attempt(lambda: read_contents(data, RECORDS))


@QUICK
@given(programs)
def test_random_programs(data):
    attempt(lambda: read_contents(data, RECORDS))


@QUICK
@given(st.data())
def test_mutated_pickles(data):
    mutant = data.draw(mutated(pickles()))
    attempt(lambda: read_contents(mutant, RECORDS))


@QUICK
@given(st.binary(max_size=300))
def test_random_archives(data):
    attempt(lambda: read_source(Memory(data), "x"))


@QUICK
@given(st.data(), st.booleans())
def test_mutated_archives(data, local_headers):
    mutant = data.draw(mutated(seeds()))
    attempt(lambda: read_source(Memory(mutant), "x", local_headers=local_headers))


@QUICK
@given(programs)
def test_programs_in_archives(data):
    """The same pickle over a real archive gives the same answer as over its records."""
    inside = attempt(lambda: read_source(Memory(archive(data)), "x"))
    alone = attempt(lambda: read_contents(data, RECORDS))
    assert (inside is None) == (alone is None)


LOADABLE = [top(tensor()), top(wrapper()), top(tensor(size=(2, 2), stride=(2, 1))), top(wrapper(), protocol=4)]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def described(tensors):
    return {
        key: (f"{type(value).__module__}.{type(value).__qualname__}", str(value.dtype)[6:], tuple(value.shape))
        for key, value in tensors.items()
    }


def compare_with_torch(pickled):
    """Whether both read it; a refusal of torch's is no fault of ours."""
    data = archive(pickled)
    contents = attempt(lambda: read_source(Memory(data), "x"))
    if contents is None or contents.others or contents.legacy:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:
        return False
    ours = {key: (value.class_name, value.dtype, value.shape) for key, value in contents.tensors.items()}
    assert described(loaded) == ours
    for key, value in contents.tensors.items():
        if value.data is not None:
            assert loaded[key].stride() == value.data.stride
            assert loaded[key].storage_offset() == value.data.storage_offset
    return True


@QUICK
@given(mutated(LOADABLE))
def test_torch_sees_what_we_see(pickled):
    """A file that we accept is one that torch loads to the same tensors, or refuses."""
    compare_with_torch(pickled)


@QUICK
@given(SHAPES, SHAPES, st.integers(0, 5))
def test_torch_sees_the_same_tensor(size, stride, offset):
    """Where the storage holds every element, both read it alike; where it does not, we refuse."""
    pickled = top(tensor(offset=offset, size=size, stride=stride))
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=False))
    count = math.prod(size)
    fits = len(size) == len(stride) and count <= 4 and offset <= 4 and (count == 0 or last < 4)
    assert compare_with_torch(pickled) == fits


@pytest.mark.parametrize(
    "opcode", [b"]", b"}", b"\x8f", b")\x85", b"K\x01", b"G" + bytes(8), b"X\1\0\0\0a", b"(l", b"(d", b"N\x94"]
)
def test_memory_of_an_opcode(opcode):
    """So much that the most opcodes that are read stay below the 1 GB that a hostile file may cost."""
    count = 20_000
    data = b"\x80\x02" + opcode * count
    tracemalloc.start()
    assert attempt(lambda: read_contents(data, RECORDS)) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / count * MAX_OPCODES < 1 << 30
