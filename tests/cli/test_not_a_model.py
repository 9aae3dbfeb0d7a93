"""Folders that look like a model and are none: one line that names the thing and the next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import LLAMA, build_llama, llama_tensors, write_config
from safetensors.torch import save_file

Call = Callable[..., Any]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def said(call: Call, source: Path, tmp_path: Path, command: str = "quantize") -> tuple[str, str]:
    """The error's line and its hint."""
    done = call(command, source, "--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out")
    assert (done.code, done.stdout) == (3, ""), done
    error, *hint = done.stderr.splitlines()
    assert len(hint) <= 1, done.stderr
    assert not (tmp_path / "out").exists()
    return error.removeprefix("error: "), "".join(hint).removeprefix("hint: ")


def save(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, str(folder / name))


def test_models_in_folders(call: Call, tmp_path: Path) -> None:
    """As sentence-transformers once saved them."""
    build_llama(tmp_path / "model" / "0_Transformer")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text("{}")
    error, hint = said(call, tmp_path / "model", tmp_path)
    assert error == "model has no config.json and no model_index.json"
    assert hint == "its subfolders hold models: --subfolder 0_Transformer"


def test_an_adapter(call: Call, tmp_path: Path) -> None:
    save(tmp_path / "peft", "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    error, hint = said(call, tmp_path / "peft", tmp_path)
    assert error == "peft is an adapter (LoRA) of org/base, not a model"
    assert "merge_and_unload" in hint
    for name in ("pytorch_lora_weights.safetensors", "style-lora.safetensors", "lora_v2.safetensors"):
        save(tmp_path / name.partition(".")[0], name)
        assert "is an adapter (LoRA), not a model" in said(call, tmp_path / name.partition(".")[0], tmp_path)[0]
    source = build_llama(tmp_path / "config-and-adapter")
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    assert (
        "no weights in config-and-adapter/, only an adapter (adapter_model.safetensors)"
        in said(call, source, tmp_path)[0]
    )


@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs(call: Call, tmp_path: Path, name: str, command: str) -> None:
    source = build_llama(tmp_path / "model")
    (source / name).write_text(POINTER)
    error, _ = said(call, source, tmp_path, command)
    assert error == f"model: {name} is a git-lfs pointer, not the file"


def test_a_pointer_in_place_of_a_bin(call: Call, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_text(POINTER)
    error, hint = said(call, source, tmp_path)
    assert error == "model: pytorch_model.bin is a git-lfs pointer, not the file"
    assert "git lfs pull" in hint


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("model-Q4_K_M.gguf", "only GGUF (model-Q4_K_M.gguf)"),
        ("tf_model.h5", "only TensorFlow (tf_model.h5)"),
        ("flax_model.msgpack", "only Flax (flax_model.msgpack)"),
        ("model.onnx", "only ONNX (model.onnx)"),
        ("consolidated.00.pth", "only the authors' own format (consolidated.00.pth)"),
        ("weights.safetensors", "only a name that the library does not look for (weights.safetensors)"),
    ],
)
def test_weights_in_another_form(call: Call, tmp_path: Path, name: str, form: str) -> None:
    source = build_llama(tmp_path / "model")
    (source / "model.safetensors").rename(source / name)
    error, _ = said(call, source, tmp_path)
    assert error.startswith(f"LlamaForCausalLM: no weights in model/, {form}")


@pytest.mark.parametrize(
    ("name", "found"),
    [("v1-5.safetensors", "only weights (v1-5.safetensors)"), ("m.gguf", "only GGUF weights (m.gguf)")],
)
def test_a_single_file_in_its_authors_layout(call: Call, tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / name).write_bytes(b"x")
    error, hint = said(call, tmp_path / "single", tmp_path)
    assert error == f"single has no config.json and no model_index.json, {found}"
    assert hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("_class_name", ["FluxTransformer2DModel"]), ("_class_name", {"a": 1}), ("_class_name", 5)],
        *[("architectures", "LlamaForCausalLM"), ("architectures", [["Llama"]]), ("model_type", ["llama"])],
    ],
)
def test_a_class_that_is_no_text(call: Call, tmp_path: Path, key: str, value: object) -> None:
    source = build_llama(tmp_path / "model", tensors=llama_tensors())
    write_config(source, {**LLAMA, key: value})
    error, _ = said(call, source, tmp_path)
    assert error.startswith(f"model: config.json: {key} is not a ")
    assert str(value)[:20] in error


def test_weights_in_8_bits_are_one_line(call: Call, tmp_path: Path) -> None:
    tensors = {
        name: value.to(torch.float8_e4m3fn) if value.dim() == 2 else value for name, value in llama_tensors().items()
    }
    count = sum(value.dim() == 2 for value in tensors.values())
    error, _ = said(call, build_llama(tmp_path / "model", tensors=tensors), tmp_path)
    first = "LlamaForCausalLM: model.embed_tokens.weight is already float8_e4m3fn"
    assert error == f"{first} (and {count - 1} more tensors likewise)"


def test_shapes_of_another_model_are_one_line(call: Call, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    write_config(source, {**LLAMA, "hidden_size": 128})
    error, _ = said(call, source, tmp_path)
    assert "but its class expects [128, 128] (and " in error
