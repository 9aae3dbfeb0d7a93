"""The check ``library`` for what is made of a single file, and with LoRAs: the library's own code is asked."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from forging import forge, rewrite
from helpers import tiny
from helpers.authors_names import MODELS
from helpers.bundles import make_bundle
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.options import DEFAULT_HUB
from aoconvert.verification.children import library_child
from aoconvert.verification.library import LibraryFindings, compare_by_library
from aoconvert.verification.original import resolve_original
from aoconvert.verification.process import Children

peft = pytest.importorskip("peft")


class Here:
    """Runs the child's own program in this process: a fresh one imports for seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **request: Any) -> None:
        self.monkeypatch, self.request = monkeypatch, request

    def ask(self, program: str, request: dict[str, Any], **limits: Any) -> list[dict[str, Any]]:
        assert program == "library_child"
        said = io.StringIO()
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request | self.request)))
        self.monkeypatch.setattr(sys, "__stdout__", said)
        library_child.main()
        return [json.loads(line) for line in said.getvalue().splitlines()]


Ask = Callable[..., LibraryFindings]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    def find(result: Path, source: Path, loras: Sequence[str] = (), **request: Any) -> LibraryFindings:
        target = from_manifest(result, manifests.load(result))
        original = resolve_original(str(source), result)
        here: Any = Here(monkeypatch, **request)
        return compare_by_library(target, original, here, trust=False, loras=loras, hub=DEFAULT_HUB)

    return find


def convert(source: Path, output: Path, **options: Any) -> None:
    aoconvert.quantize(source, "int8wo", output=output, min_quantized=0, device="cpu", **options)


def single_file(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    make, rename = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_config(folder / "config")
    state = {key: tensor.clone() for key, tensor in rename(model.state_dict()).items()}
    save_file(state, folder / "original.safetensors")
    return folder / "original.safetensors", folder / "config"


def weights(folder: Path) -> Path:
    return next(folder.rglob("*pytorch_model.bin"))


def exchange(state: dict[str, Any]) -> None:
    first, second = (f"transformer_blocks.0.attn.to_{part}.weight" for part in "qk")
    state[first], state[second] = state[second], state[first]


def scale_row(state: dict[str, Any]) -> None:
    state["pos_embed.proj.bias"][1] *= 2


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sd3", torch.bfloat16),
        ("wan", torch.float32),
        pytest.param("sdxl", torch.float16, marks=pytest.mark.exhaustive),
        pytest.param("ltx", torch.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param("sd3", torch.float32, marks=pytest.mark.exhaustive),
    ],
)
def test_the_library_opens_the_single_file(tmp_path: Path, ask: Ask, name: str, dtype: torch.dtype) -> None:
    file, config = single_file(tmp_path, name, dtype)
    convert(file, tmp_path / "out", config=config)
    found = ask(tmp_path / "out", file)
    assert found.status == "passed", found.detail
    assert "tensors have the source's bits" in found.detail
    assert "was opened with the result's own config" in found.detail
    short = ask(tmp_path / "out", file, available=100)  # of what is only renamed nothing is copied
    copied = name == "sd3"
    assert short.status == ("skipped" if copied else "passed"), short.detail
    assert ("GB of memory" in short.detail) == copied


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (exchange, "transformer_blocks.0.attn.to_k.weight has an SQNR of"),
        (scale_row, "pos_embed.proj.bias has other values than the source"),
    ],
)
def test_a_fault_in_what_was_made_of_a_single_file(
    tmp_path: Path, ask: Ask, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    file, config = single_file(tmp_path, "sd3")
    convert(file, tmp_path / "out", config=config)
    rewrite(weights(tmp_path / "out"), change)
    forge(tmp_path / "out")
    found = ask(tmp_path / "out", file)
    assert (found.status, says in found.detail) == ("failed", True), found.detail


def fill(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def with_lora(folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """A denoiser's folder, and a LoRA of it as diffusers saves it."""
    torch.manual_seed(0)
    model = tiny.sd3_transformer().to(dtype)
    model.save_pretrained(folder / "source")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "proj", "linear_1"]))
    fill(model)
    model.save_lora_adapter(folder / "lora")
    return folder / "source", folder / "lora" / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_library_adds_the_lora(tmp_path: Path, ask: Ask, dtype: torch.dtype) -> None:
    source, lora = with_lora(tmp_path, dtype)
    convert(source, tmp_path / "out", lora=f"{lora}@0.5")
    found = ask(tmp_path / "out", source, [str(lora)])
    assert found.status == "passed", found.detail
    assert ask(tmp_path / "out", source).status == "skipped"
    short = ask(tmp_path / "out", source, [str(lora)], available=20_000_000 if dtype == torch.bfloat16 else 0)
    assert short.status == ("passed" if dtype == torch.bfloat16 else "skipped"), short.detail


def drop_key(lora: Path) -> str:
    state = load_file(lora)
    names = [name for name in state if "blocks.0.attn.to_q" in name]
    from safetensors import safe_open

    with safe_open(lora, "pt") as opened:
        header = opened.metadata()
    save_file({name: tensor for name, tensor in state.items() if name not in names}, lora, header)
    return str(lora)


@pytest.mark.parametrize("fault", ["dropped", "twice"])
def test_a_fault_in_adding_the_lora(tmp_path: Path, ask: Ask, fault: str) -> None:
    """A key that is not added; everything added twice: in a result whose manifest says what it should say."""
    source, lora = with_lora(tmp_path, torch.bfloat16)
    convert(source, tmp_path / "right", lora=str(lora))
    if fault == "twice":
        convert(source, tmp_path / "wrong", lora=f"{lora}@2")
    else:
        shutil.copytree(lora.parent, tmp_path / "less")
        convert(source, tmp_path / "wrong", lora=drop_key(tmp_path / "less" / lora.name))
    shutil.copy(weights(tmp_path / "wrong"), weights(tmp_path / "right"))
    forge(tmp_path / "right")
    found = ask(tmp_path / "right", source, [str(lora)])
    says = "transformer_blocks.0.attn.to_q.weight has an SQNR of"
    assert (found.status, says in found.detail) == ("failed", True), found.detail


def test_another_lora_of_that_name(tmp_path: Path, ask: Ask) -> None:
    source, lora = with_lora(tmp_path, torch.bfloat16)
    convert(source, tmp_path / "out", lora=str(lora))
    found = ask(tmp_path / "out", source, [drop_key(lora)])
    assert (found.status, "its SHA-256 is another one" in found.detail) == ("failed", True)


def test_a_single_file_with_a_lora(tmp_path: Path, ask: Ask) -> None:
    _, lora = with_lora(tmp_path, torch.bfloat16)
    file, config = single_file(tmp_path, "sd3")
    convert(file, tmp_path / "out", config=config, lora=str(lora))
    found = ask(tmp_path / "out", file, [str(lora)])
    assert found.status == "passed", found.detail


def test_peft_merges_into_a_model_of_transformers(tmp_path: Path, ask: Ask) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    source = transformers.GPT2LMHeadModel(config).bfloat16()
    source.save_pretrained(tmp_path / "source")
    model = peft.get_peft_model(source, peft.LoraConfig(r=4, lora_alpha=7, target_modules=["c_attn", "c_fc"]))
    fill(model)
    model.save_pretrained(tmp_path / "lora")
    options = {"untie": True, "default_skips": False}
    file = tmp_path / "lora" / "adapter_model.safetensors"
    convert(tmp_path / "source", tmp_path / "out", lora=f"{file}@0.75", **options)
    found = ask(tmp_path / "out", tmp_path / "source", [str(file)])
    assert found.status == "passed", found.detail
    convert(tmp_path / "source", tmp_path / "twice", lora=f"{file}@1.5", **options)
    shutil.copy(weights(tmp_path / "twice"), weights(tmp_path / "out"))
    forge(tmp_path / "out")
    found = ask(tmp_path / "out", tmp_path / "source", [str(file)])
    assert (found.status, "attn.c_attn.weight" in found.detail) == ("failed", True), found.detail


@pytest.mark.exhaustive
def test_a_pipeline_with_two_loras(tmp_path: Path, ask: Ask) -> None:
    import diffusers

    tiny.sd3_pipeline(tmp_path / "source")
    files = []
    for number, target in enumerate(("to_q", "to_k")):
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "source", torch_dtype=torch.float32)
        pipe.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=[target]))
        fill(pipe.transformer, number)
        layers = peft.get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(tmp_path / f"lora{number}", layers, weight_name=f"lora{number}.safetensors")
        files.append(str(tmp_path / f"lora{number}" / f"lora{number}.safetensors"))
    convert(tmp_path / "source", tmp_path / "out", lora=[files[0], f"{files[1]}@0.5"])
    found = ask(tmp_path / "out", tmp_path / "source", files)
    assert found.status == "passed", found.detail


@pytest.mark.parametrize("name", ["sdxl", pytest.param("sd3", marks=pytest.mark.exhaustive)])
def test_the_library_makes_the_pipeline_of_the_single_file(tmp_path: Path, ask: Ask, name: str) -> None:
    file, pipeline = make_bundle(tmp_path, name)
    convert(file, tmp_path / "out", config=pipeline)
    found = ask(tmp_path / "out", file)
    assert found.status == "passed", found.detail
    text_encoder = tmp_path / "out" / "text_encoder_2" / "pytorch_model.bin"

    def change(state: dict[str, Any]) -> None:
        state["text_model.encoder.layers.0.mlp.fc1.weight"][0] *= 2

    rewrite(text_encoder, change)
    forge(tmp_path / "out")
    found = ask(tmp_path / "out", file)
    says = "text_encoder_2: text_model.encoder.layers.0.mlp.fc1.weight has other values than the source"
    assert (found.status, says in found.detail) == ("failed", True), found.detail


@pytest.mark.exhaustive
def test_a_gigabyte_takes_little_memory(tmp_path: Path) -> None:
    """What the interpreter has of its own: imports and pieces; the conversion of LTX only renames."""
    import diffusers

    with torch.device("meta"):
        model: Any = diffusers.LTXVideoTransformer3DModel(
            num_attention_heads=32, attention_head_dim=64, cross_attention_dim=2048, num_layers=8
        )
    model = model.bfloat16().to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.normal_(std=0.02)
    model.save_config(tmp_path / "config")
    file = tmp_path / "original.safetensors"
    save_file({key: tensor.clone() for key, tensor in MODELS["ltx"][1](model.state_dict()).items()}, file)
    assert file.stat().st_size > 10**9
    del model
    convert(file, tmp_path / "out", config=tmp_path / "config")
    target = from_manifest(tmp_path / "out", manifests.load(tmp_path / "out"))
    peak, over = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(OSError, StopIteration):
                    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
                    peak = max(peak, int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=sample)
    watcher.start()
    found = compare_by_library(target, resolve_original(str(file), tmp_path / "out"), Children(), trust=False)
    over.set()
    watcher.join()
    assert found.status == "passed", found
    assert 1e8 < peak < 1e9
