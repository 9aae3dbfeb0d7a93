"""Checkpoints by others, from headers that are built here as their formats say."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aoconvert.errors import AoconvertError, SourceError
from aoconvert.formats.gguf.start import read_gguf
from aoconvert.formats.safetensors.header import read_header
from aoconvert.inspection.inspect import inspect


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> str:
    save_file(tensors, folder / "model.safetensors")
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if config is not None:
        values["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def check(found: dict[str, Any], kind: str, scheme: str | None, parameters: int, quantized: int) -> None:
    assert (found["kind"], found["scheme"]) == (kind, scheme)
    assert (found["parameters"], found["quantized_parameters"]) == (parameters, quantized)
    assert (found["library"], found["class"]) == ("transformers", "LlamaForCausalLM")
    assert found["loads_with"]["torchao"] is None


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_bitsandbytes_4bit(quant: str, tmp_path: Path) -> None:
    tensors = {
        "model.q.weight": empty(64 * 32 // 2, 1, dtype=torch.uint8),
        "model.q.weight.absmax": empty(32, dtype=torch.float32),
        "model.q.weight.quant_map": empty(16, dtype=torch.float32),
        f"model.q.weight.quant_state.bitsandbytes__{quant}": empty(80, dtype=torch.uint8),
        "model.norm.weight": empty(32),
    }
    found = inspect(write(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})).to_dict()
    check(found, "bitsandbytes", f"bnb_{quant}", 64 * 32 + 32, 64 * 32)
    assert found["loads_with"]["packages"] == ["bitsandbytes"]
    missing = find_spec("bitsandbytes") is None
    assert ("bitsandbytes is not installed" in (found["why_not"] or "")) == missing


def test_bitsandbytes_8bit_without_a_config(tmp_path: Path) -> None:
    tensors = {
        "model.q.weight": empty(64, 32, dtype=torch.int8),
        "model.q.SCB": empty(64, dtype=torch.float32),
        "model.q.weight_format": empty(dtype=torch.uint8),
        "model.norm.weight": empty(32),
    }
    check(inspect(write(tmp_path, tensors)).to_dict(), "bitsandbytes", "bnb_int8", 64 * 32 + 32, 64 * 32)


def test_compressed_tensors_packed(tmp_path: Path) -> None:
    tensors = {
        "model.q.weight_packed": empty(64, 32 // 8, dtype=torch.int32),
        "model.q.weight_scale": empty(64, 1),
        "model.q.weight_shape": empty(2, dtype=torch.int64),
        "model.norm.weight": empty(32),
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
    }
    found = inspect(write(tmp_path, tensors, config)).to_dict()
    check(found, "compressed-tensors", "compressed_pack-quantized", 64 * 32 + 32, 64 * 32)


def test_compressed_tensors_float8(tmp_path: Path) -> None:
    tensors = {
        "model.q.weight": empty(64, 32, dtype=torch.float8_e4m3fn),
        "model.q.weight_scale": empty(64, 1),
        "model.norm.weight": empty(32),
    }
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    found = inspect(write(tmp_path, tensors, config)).to_dict()
    check(found, "compressed-tensors", "compressed_float-quantized", 64 * 32 + 32, 64 * 32)


@pytest.mark.parametrize(
    ("method", "bits", "qweight", "extra"),
    [
        ("gptq", 4, (32 // 8, 64), {"g_idx": (32,)}),
        ("gptq", 8, (32 // 4, 64), {"g_idx": (32,)}),
        ("awq", 4, (32, 64 // 8), {}),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_gptq_and_awq(
    method: str, bits: int, qweight: tuple[int, int], extra: dict[str, tuple[int]], says: bool, tmp_path: Path
) -> None:
    tensors = {
        "model.q.qweight": empty(*qweight, dtype=torch.int32),
        "model.q.qzeros": empty(1, 8, dtype=torch.int32),
        "model.q.scales": empty(1, 64, dtype=torch.float16),
        "model.norm.weight": empty(32),
        **{f"model.q.{name}": empty(*shape, dtype=torch.int32) for name, shape in extra.items()},
    }
    config = {"quant_method": method, "bits": bits} if says else {"bits": bits}
    found = inspect(write(tmp_path, tensors, config)).to_dict()
    check(found, method, f"{method}_int{bits}", 64 * 32 + 32, 64 * 32)


def test_another_quant_method_is_named_and_not_judged(tmp_path: Path) -> None:
    tensors = {
        "model.q.weight": empty(64, 32, dtype=torch.float8_e4m3fn),
        "model.q.weight_scale_inv": empty(1, 1, dtype=torch.float32),
    }
    found = inspect(write(tmp_path, tensors, {"quant_method": "fp8"})).to_dict()
    assert (found["kind"], found["scheme"], found["loads_here"]) == ("fp8", "fp8", None)


def test_plain_float(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, {"model.q.weight": empty(64, 32), "model.norm.weight": empty(32)})).to_dict()
    check(found, "plain", None, 64 * 32 + 32, 0)
    assert found["loads_here"] is True
    assert found["advice"] == []


def test_plain_bin_in_a_training_checkpoint(tmp_path: Path) -> None:
    torch.save({"step": 3, "state_dict": {"a.weight": empty(4, 4)}}, tmp_path / "last.ckpt")
    found = inspect(str(tmp_path / "last.ckpt")).to_dict()
    assert (found["kind"], found["parameters"]) == ("plain", 16)
    assert found["files"][0]["tensors"] == 1


def gguf(values: dict[str, Any], *, order: str = "<", version: int = 3, tensors: int = 7) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack(f"{order}Q", len(value.encode())) + value.encode()

    body = b""
    for key, value in values.items():
        body += text(key)
        if isinstance(value, str):
            body += struct.pack(f"{order}I", 8) + text(value)
        elif isinstance(value, list):
            body += struct.pack(f"{order}IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)
        else:
            body += struct.pack(f"{order}II", 4, value)
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, len(values)) + body


@pytest.mark.parametrize("order", ["<", ">"])
def test_gguf(order: str, tmp_path: Path) -> None:
    values = {
        "general.architecture": "llama",
        "general.file_type": 15,
        "tokenizer.ggml.tokens": ["a", "b"],
        "general.late": "not read: it stands behind an array",
    }
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf(values, order=order))
    found = inspect(str(file)).to_dict()
    assert (found["kind"], found["scheme"], found["files"][0]["tensors"]) == ("gguf", "Q4_K_M", 7)
    assert found["loads_with"] == {"torchao": None, "packages": ["gguf"]}


def test_gguf_that_is_none(tmp_path: Path) -> None:
    for content, what in (
        (b"GGUF", "truncated"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (gguf({}, version=99), "version 99"),
    ):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        with pytest.raises(SourceError, match=what):
            inspect(str(file))


@pytest.mark.parametrize("cut", [0, 5, 100])
def test_truncated_safetensors(cut: int, tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.weight": empty(64, 64)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:cut])
    with pytest.raises(SourceError, match=r"model\.safetensors: is truncated"):
        inspect(folder)


class Canary:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("touch canary",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_hostile_pickle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"w": Canary()}, protocol=2))
        archive.writestr("a/version", "3\n")
    found = inspect(str(tmp_path / name)).to_dict()
    assert (found["kind"], found["loads_here"]) == ("unreadable", False)
    assert len(found["unsafe"]) == 1
    assert "posix.system" in found["unsafe"][0]
    assert any("do not load it" in line for line in found["advice"])
    assert not (tmp_path / "canary").exists()


def test_one_hostile_shard_among_good_ones(tmp_path: Path) -> None:
    torch.save({"a.weight": empty(4, 4)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with zipfile.ZipFile(tmp_path / "pytorch_model-00002-of-00002.bin", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"b.weight": Canary()}, protocol=2))
    weight_map = {f"{name}.weight": f"pytorch_model-0000{i}-of-00002.bin" for i, name in ((1, "a"), (2, "b"))}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = inspect(str(tmp_path))
    assert found.kind == "unreadable"
    assert len(found.unsafe) == 1
    assert "00002-of-00002" in found.unsafe[0]


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_truncated_bin(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    torch.save({"w": empty(64, 64)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    found = inspect(str(file))
    assert found.unsafe
    assert found.loads_here is False


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({}, "holds no weights"),
        ({"readme.txt": "x"}, "holds no weights"),
        ({"model_index.json": '{"_class_name": "P", "vae": ["diffusers", "AutoencoderKL"]}'}, "without weights"),
        ({"config.json": "[1]"}, "config.json is not a JSON object"),
        ({"config.json": "{"}, "config.json is not valid JSON"),
        ({"model_index.json": '{"../x": ["diffusers", "A"], "_y": 1, "z": 3}'}, "without weights"),
    ],
)
def test_what_is_no_checkpoint(files: dict[str, str], what: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=what):
        inspect(str(tmp_path))


def test_leftovers_of_training_are_no_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.weight": empty(4, 4)})
    torch.save({"x": empty(2)}, tmp_path / "optimizer.pt")
    (tmp_path / "config.json").unlink()
    assert [file["path"] for file in inspect(folder).to_dict()["files"]] == ["model.safetensors"]


def test_a_missing_shard_is_why_it_cannot_be_loaded(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight": empty(4, 4)})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = inspect(str(tmp_path)).to_dict()
    assert (found["kind"], found["parameters"], found["loads_here"]) == ("plain", 16, False)
    assert "'model-00002-of-00002.safetensors' does not exist" in found["why_not"]


WORDS = [
    "quantization_config",
    "quant_method",
    "quant_type",
    "bits",
    "weights_dtype",
    "format",
    "config_groups",
    "_type",
    "_data",
    "_tensor_data_names",
    "shape",
    "act_quant_kwargs",
    "target_dtype",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["gptq", "torchao", "quanto"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(WORDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KEYS = ["a.weight._data", "a.weight._scale", "a.qweight", "a.scales", "a.weight_packed", "a.SCB", "a._weight_qdata"]


@settings(max_examples=150, deadline=None)
@given(JSON, st.dictionaries(st.sampled_from(["a.weight", "tensor_names", "x"]), JSON), st.sets(st.sampled_from(KEYS)))
def test_any_config_and_metadata_give_an_answer(
    tmp_path_factory: pytest.TempPathFactory, config: Any, metadata: dict[str, Any], keys: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config, "_class_name": config}))
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    texts |= {"tensor_names": '["a.weight"]'} if "a.weight" in keys else {}
    tensors = {key: torch.zeros(2, 2, dtype=torch.int8) for key in {"norm.weight", *keys}}
    save_file(tensors, folder / "model.safetensors", texts)
    found = json.loads(json.dumps(inspect(str(folder)).to_dict()))
    assert found["kind"]
    assert found["quantized_parameters"] <= found["parameters"]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["Int8Tensor", "Int4Tensor", "MXTensor", "IntxUnpackedToInt8Tensor", "Tensor", "X"]), JSON, JSON)
def test_any_description_of_a_tensor_gives_an_answer(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any, names: Any
) -> None:
    file = tmp_path_factory.mktemp("any") / "model.safetensors"
    entry = {"_type": kind, "_data": data, "_tensor_data_names": names}
    texts = {"tensor_names": '["a.weight"]', "a.weight": json.dumps(entry)}
    save_file({"a._weight_qdata": torch.zeros(2, 2, dtype=torch.int8)}, file, texts)
    assert inspect(str(file)).to_dict()["kind"] == "torchao-safetensors"


class Bytes:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)

    def read(self, offset: int, count: int) -> bytes:
        assert offset >= 0
        assert offset + count <= self.size
        return self.content[offset : offset + count]


HEADER = gguf({"general.architecture": "llama", "general.file_type": 7, "x": ["a"]})


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(HEADER) - 1), st.integers(0, 255), st.integers(0, len(HEADER)))
def test_damaged_gguf_is_an_error_or_a_header(place: int, value: int, cut: int) -> None:
    damaged = bytearray(HEADER)
    damaged[place] = value
    try:
        header = read_gguf(Bytes(bytes(damaged[:cut])), "f")
    except AoconvertError as error:
        assert "\n" not in error.message
    else:
        assert header.version in (2, 3)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=64), st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["__metadata__", "dtype", "shape", "a"]), inner)
), max_leaves=10)))  # fmt: skip
def test_any_safetensors_header_is_an_error_or_a_header(content: Any) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    for file in (raw, struct.pack("<Q", len(raw)) + raw):
        try:
            header = read_header(Bytes(file), "f")
        except AoconvertError as error:
            assert "\n" not in error.message
        else:
            assert isinstance(header.entries, dict)
            assert all(isinstance(value, str) for value in header.metadata.values())


def test_the_architectures_for_which_quantize_is_named_are_those_that_transformers_converts() -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    from aoconvert.inspection.foreign import GGUF_LANGUAGE_MODELS

    other = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2", "t5encoder": "t5"}
    assert {other.get(name, name) for name in GGUF_LANGUAGE_MODELS} <= set(GGUF_SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize(("architecture", "named"), [("llama", True), ("flux", False)])
def test_a_gguf_file_of_a_language_model_ends_with_quantize(architecture: str, named: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf({"general.architecture": architecture}))
    expected = f"aoconvert quantize {file} --scheme int8wo" if named else None
    assert inspect(str(file)).next_command == expected
