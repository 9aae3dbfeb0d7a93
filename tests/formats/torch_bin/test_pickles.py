"""What the safe reader says of real files, against torch.load, and against what old torchao said of its own."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import pytest
import torch
from helpers.bits import bits
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int4Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerTensor,
    quantize_,
)

from aoconvert import schemes
from aoconvert.errors import SourceError, UnsafePickleError
from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Symbol
from aoconvert.formats.torch_bin.header import read_bin, read_loadable, read_source
from aoconvert.formats.torch_bin.writer import TorchBinWriter
from aoconvert.schemes.apply import quantize_weight
from aoconvert.sources.byte_source import LocalFile

ROOT = Path(__file__).parents[2]
LEGACY = sorted((ROOT / "fixtures" / "legacy").glob("*/*/*.bin"))
LOADABLE = {"float8dq_e4m3_perrow_v2", "int8wo_v2", "int8dq_v2"}

CONFIGS = {
    "int8wo": Int8WeightOnlyConfig(),
    "int8wo-group": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int8wo-tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "int8dq": Int8DynamicActivationInt8WeightConfig(),
    "int8dq-asymmetric": Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
    "fp8wo-e4m3": Float8WeightOnlyConfig(weight_dtype=torch.float8_e4m3fn),
    "fp8wo-e5m2": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    "int8dq-int4": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
    "mx": MXDynamicActivationMXWeightConfig(),
    "nvfp4": NVFP4WeightOnlyConfig(),
    **{
        f"intx{bits}-{mapping.name.lower()}-{type(granularity).__name__}": IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity, mapping_type=mapping
        )
        for bits in range(1, 9)
        for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC)
        for granularity in (PerGroup(32), PerAxis(0))
    },
}
# what a torchao config alone does not make on every machine: scheme and layout device
SCHEMES = [
    *((name, None) for name in ("float8dq", "float8dq_row", "float8dq_block", "nvfp4")),
    *((name, None) for name in ("mxfp4", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2")),
    *(("int4wo", device) for device in ("cpu", "cuda", "xpu")),
]
PLAIN = [
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
]


def quantized(name):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    quantize_(linear, CONFIGS[name])
    return linear.weight.detach()


def of_scheme(name, device):
    torch.manual_seed(0)
    return quantize_weight(torch.randn(128, 256, dtype=torch.bfloat16), schemes.get(name, layout_device=device))


def int4_of_mslk():
    """What it packs runs on a Hopper GPU only; its class holds data anywhere."""
    one = torch.ones(1, 64)
    data, shape = torch.zeros(64, 64, dtype=torch.int8), torch.Size((64, 128))
    return Int4Tensor(data, one, one, [1, 128], shape, act_pre_scale=torch.ones(128), activation_dtype=torch.bfloat16)


def model():
    tensors = {name: quantized(name) for name in CONFIGS}
    tensors |= {f"{name}-{device}": of_scheme(name, device) for name, device in SCHEMES}
    tensors["int4-plain"] = int4_of_mslk()
    tensors["experts"] = quantize_weight(torch.randn(3, 32, 64).bfloat16(), schemes.get("float8wo"))
    for dtype in PLAIN:
        data = torch.randint(0, 2, (15 * getattr(torch, dtype).itemsize,), dtype=torch.uint8)
        tensors[dtype] = data.view(getattr(torch, dtype)).reshape(3, 5)
    return tensors


def dotted(kind):
    return f"{kind.__module__}.{kind.__qualname__}"


def plain(value):
    """A live value as the reader says it."""
    match value:
        case None | bool() | int() | float() | str() if not isinstance(value, Enum):
            return value
        case torch.dtype() | torch.layout():
            return Symbol(str(value))
        case torch.device():
            return Instance("torch.device", (str(value),))
        case Enum():
            return Instance(dotted(type(value)), (value.value,))
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case torch.Size() | list():
            return tuple(map(plain, value))
        case tuple() if type(value) is tuple:
            return tuple(map(plain, value))
        case tuple():
            return Instance(dotted(type(value)), tuple(map(plain, value)))
    assert dataclasses.is_dataclass(value)
    return Instance(dotted(type(value)), (), plain(vars(value)))


def assert_entry(entry, tensor, content):
    """``entry`` says everything of ``tensor``, and its bytes are where it says.

    A class that is newer than the file adds attributes, which are None.
    """
    assert isinstance(entry, BinTensor)
    assert entry.class_name == dotted(type(tensor))
    assert (entry.dtype, entry.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    assert (entry.requires_grad, entry.location) == (tensor.requires_grad, "cpu")
    inner = {name: value for name, value in vars(tensor).items() if isinstance(value, torch.Tensor)}
    assert list(entry.inner) == list(inner)
    for name, value in inner.items():
        assert_entry(entry.inner[name], value, content)
    expected = {name: plain(value) for name, value in vars(tensor).items() if name not in inner}
    assert entry.attributes == {name: value for name, value in expected.items() if name in entry.attributes}
    assert not [value for name, value in expected.items() if name not in entry.attributes and value is not None]
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        assert entry.data is None
        assert entry.nbytes == sum(value.numel() * value.element_size() for value in inner.values())
        return
    data = entry.data
    assert (data.stride, data.nbytes) == (tensor.stride(), tensor.numel() * tensor.element_size())
    assert data.storage_offset == tensor.storage_offset()
    if not tensor.numel():
        return
    span = 1 + sum((length - 1) * step for length, step in zip(entry.shape, data.stride, strict=True))
    raw = torch.frombuffer(
        bytearray(content[data.offset : data.offset + span * tensor.element_size()]), dtype=torch.uint8
    )
    found = raw.view(tensor.dtype).as_strided(entry.shape, data.stride)
    assert torch.equal(bits(found), bits(tensor.detach()))


def assert_same(path):
    contents = read_bin(path)
    loaded = torch.load(path, weights_only=True)
    content = path.read_bytes()
    assert list(contents.tensors) == list(loaded)
    for name, tensor in loaded.items():
        assert_entry(contents.tensors[name], tensor, content)
    with LocalFile(path) as source:
        lazily = read_source(source, "x", local_headers=False)
    assert list(lazily.tensors) == list(loaded)
    assert {info.offset for info in lazily.storages.values()} <= {None}
    assert read_loadable(path) == contents
    return contents


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_our_writer_s_files(tmp_path):
    path = tmp_path / "model.bin"
    with TorchBinWriter(path) as writer:
        for name, tensor in model().items():
            writer.add(name, tensor)
        sealed = writer.seal()
    contents = assert_same(path)
    assert [use.name for use in contents.globals] == list(sealed.globals)
    assert (contents.protocol, contents.byteorder, contents.legacy, contents.others) == (2, "little", (), {})


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_torch_save_s_files(tmp_path):
    path = tmp_path / "model.bin"
    torch.save(model(), path)
    assert_same(path)


def test_parameters_attributes_views_and_ordered_dicts(tmp_path):
    path = tmp_path / "model.bin"
    base = torch.arange(4000, dtype=torch.float32).reshape(40, 100)
    tagged = torch.ones(3)
    tagged.note = {"ints": [0, 2**70, -1], "pi": 3.14, "none": None, "sizes": (torch.Size([2]), torch.int4)}
    tied = torch.randn(3)
    tensors = OrderedDict(
        p=torch.nn.Parameter(torch.randn(2, 3)), q=torch.nn.Parameter(quantized("int8dq"), False), tagged=tagged,
        row=base[3], column=base[:, 7], turned=base.t(), empty=base[:0], scalar=torch.tensor(1.0), a=tied, b=tied,
    )  # fmt: skip
    torch.save(tensors, path)
    contents = assert_same(path)
    assert contents.tensors["a"].data == contents.tensors["b"].data
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    assert list(assert_same(path).tensors) == ["weight", "bias"]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_protocols(protocol, tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"x": torch.ones(3), "w": quantized("fp8wo-e4m3")}, path, pickle_protocol=protocol)
    contents = read_bin(path)
    assert contents.protocol == protocol
    assert [tensor.class_name for tensor in contents.tensors.values()] == [
        "torch.Tensor",
        dotted(type(quantized("fp8wo-e4m3"))),
    ]


def test_what_is_no_tensor_is_kept_beside(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": {"x": torch.ones(2)}, "step": 7, "seen": {1, 2}, "rate": [0.5, None]}, path)
    contents = read_bin(path)
    assert contents.tensors == {}
    assert contents.others["model"]["x"].shape == (2,)
    assert (contents.others["step"], contents.others["rate"]) == (7, (0.5, None))
    assert contents.others["seen"] == Instance("builtins.set", (1, 2))


def test_a_whole_module_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UnsafePickleError, match=r"torch\.nn\.modules\.linear\.Linear is not a name"):
        read_bin(path)


def test_an_expanded_tensor_is_refused_with_its_numbers(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"x": torch.ones(1).expand(50)}, path)
    with pytest.raises(UnsafePickleError, match=r"50 elements \(shape \(50,\), stride \(0,\).* holds 1"):
        read_bin(path)


class TestLegacy:
    def test_all_are_here(self):
        assert len(LEGACY) == 29

    @pytest.mark.parametrize("path", LEGACY, ids=lambda path: "/".join(path.parts[-3:-1]))
    def test_what_the_old_version_said(self, path):
        """``meta.json`` holds what the writing version itself showed of its first quantized tensor."""
        contents = read_bin(path)
        quantized_tensors = {name: tensor for name, tensor in contents.tensors.items() if tensor.data is None}
        meta = json.loads((path.parent / "meta.json").read_text())
        if "tensor0" in meta:
            assert set(quantized_tensors) == set(meta["quantized_keys"])
            self.compare(quantized_tensors[meta["quantized_keys"][0]], meta["tensor0"])
        else:
            assert "transformer_blocks.0.attn1.to_q.weight" in quantized_tensors
        loadable = path.parent.name in LOADABLE
        assert (contents.legacy == ()) == loadable
        if loadable:
            assert_same(path)
        else:
            with pytest.raises(UnsafePickleError, match=r"torchao older than 0\.18"):
                read_loadable(path)

    def compare(self, entry, said):
        assert (entry.class_name, entry.dtype, list(entry.shape)) == (said["cls"], said["dtype"], said["shape"])
        assert [*entry.inner, *entry.attributes] == sorted(said["dict"], key=[*entry.inner, *entry.attributes].index)
        for name, what in said["dict"].items():
            if isinstance(what, dict):
                self.compare(entry.inner[name], what)
            elif found := re.fullmatch(r"Tensor\[(\w+),(\[.*?\]),stride=(\[.*?\])\]", what):
                inner = entry.inner[name]
                shape, stride = json.loads(found[2]), json.loads(found[3])
                assert (inner.dtype, list(inner.shape), list(inner.data.stride)) == (found[1], shape, stride)
            else:
                assert self.shown(entry.attributes[name], what) == what

    def shown(self, value, what):
        """``value`` as the repr of the live object, as far as the pickle holds it."""
        match value:
            case Symbol(name) if what.startswith("<function "):
                return re.sub(r"(?<=<function ).*(?= at )", name.rpartition(".")[2], what)
            case Symbol(name):
                return name
            case Instance(cls, (member,)) if what[0] == "<":
                return f"<{cls.rpartition('.')[2]}.{what.split('.')[1].split(':')[0]}: {member!r}>"
            case Instance(cls, _, state) if "(" in what:
                for name, item in state.items():
                    scalar = item is None or isinstance(item, (bool, int, float))
                    assert (f"{name}={item}" if scalar else f"{name}=") in what
                assert cls.rpartition(".")[2] in what
                return what
            case dict():
                assert re.findall(r"'(\w+)': ", what) == list(value)
                return what
            case tuple() if what[0] == "[":
                return str(list(value))
            case tuple() if what.startswith("torch.Size"):
                return f"torch.Size({list(value)})"
        return str(value)

    def test_activation_settings_of_0_6_1(self):
        path = ROOT / "fixtures/legacy/torchao-0.6.1/float8dq_e4m3_perrow/model.bin"
        tensor = read_bin(path).tensors["blocks.0.attn.to_q.weight"]
        assert tensor.attributes["input_quant_func"] == Instance(
            "functools.partial",
            (Symbol("torchao.quantization.quant_api._input_activation_quant_func_fp8"),),
            {
                "activation_granularity": Instance("torchao.quantization.observer.PerRow"),
                "activation_dtype": Symbol("torch.float8_e4m3fn"),
            },
        )


class Counting:
    """A source that says how much of it was read."""

    def __init__(self, source):
        self.source, self.size, self.count = source, source.size, 0

    def read(self, offset, count):
        self.count += count
        return self.source.read(offset, count)


def test_a_file_of_a_gigabyte_is_read_by_less_than_a_megabyte(tmp_path):
    """torch leaves the data out, so that it takes no place on the disk; all else is as in any file of its size."""
    path = tmp_path / "model.bin"
    weight = quantized("int8wo")
    tensors = {f"blocks.{index}.weight": weight.clone() for index in range(400)}
    with torch.serialization.skip_data():
        torch.save(tensors | {"big": torch.empty(1 << 28, dtype=torch.float32)}, path)
    assert path.stat().st_size > 1 << 30
    with LocalFile(path) as source:
        counting, lazily = Counting(source), Counting(source)
        read_source(counting, "x")
        read_source(lazily, "x", local_headers=False)
    assert lazily.count < counting.count < 1 << 20
    script = """
import resource, sys
from pathlib import Path
from aoconvert.formats.torch_bin.header import read_bin
# not ru_maxrss, which starts at the size of whoever started this process
def peak():
    return [int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')][0]
before = peak()
assert len(read_bin(Path(sys.argv[1])).tensors) == 401
print(peak() - before, "torch" in sys.modules)
"""
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    grown, torch_imported = done.stdout.split()
    assert int(grown) < 20_000
    assert torch_imported == "False"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "nul"])
def test_what_is_no_file(kind, tmp_path):
    path = {"missing": tmp_path / "x", "folder": tmp_path, "pipe": tmp_path / "pipe", "nul": Path("a\0b")}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(SourceError):
        read_bin(path)
