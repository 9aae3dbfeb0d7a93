"""Memory of a whole conversion of a quantized original, measured by the kernel."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import LLAMA, llama_shapes, write_config

REPO = Path(__file__).resolve().parents[2]
LARGE: dict[str, Any] = {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LARGE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 4096}

# A child's peak starts at the size of the process that starts it, and pytest is large by now: this one is small.
MEASURE = """
import json, os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]), file=sys.stderr)
"""


def build(folder: Path) -> Path:
    """A Llama in block-FP8, a gigabyte of it, written tensor by tensor."""
    write_config(folder, {**LARGE, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    entries: dict[str, Any] = {}
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in llama_shapes(LARGE).items():
        if ".layers." in name and len(shape) == 2:
            shapes[name] = (shape, torch.float8_e4m3fn)
            shapes[f"{name}_scale_inv"] = (tuple(-(-size // 128) for size in shape), torch.float32)
        else:
            shapes[name] = (shape, torch.bfloat16)
    words, offset = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}, 0
    for name, (shape, dtype) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": words[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(entries).encode()
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for shape, dtype in shapes.values():
            values = torch.rand(shape, generator=generator).add(0.01).to(dtype)
            file.write(values.view(torch.uint8).numpy().tobytes())
    return folder


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_gigabyte_in_block_fp8_takes_less_than_900_mb(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    assert (source / "model.safetensors").stat().st_size > 10**9
    words = ["-m", "aoconvert", "quantize", str(source), "--scheme", "int8wo", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, sys.executable, *words, "--device", "cpu", "--json"],
        env={**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    code, peak = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    print("peak", peak / 1e6, json.loads(done.stdout)["seconds"])
    assert peak < 900 * 10**6


def build_gguf(file: Path) -> Path:
    """A Llama in Q8_0, a gigabyte of it, written tensor by tensor."""
    import gguf
    from gguf import GGMLQuantizationType as Kind
    from helpers.gguf_files import blocks

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LARGE["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=False)
    writer.add_context_length(LARGE["max_position_embeddings"])
    writer.add_embedding_length(LARGE["hidden_size"])
    writer.add_block_count(LARGE["num_hidden_layers"])
    writer.add_feed_forward_length(LARGE["intermediate_size"])
    writer.add_head_count(LARGE["num_attention_heads"])
    writer.add_head_count_kv(LARGE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(LARGE["vocab_size"])
    shapes = llama_shapes(LARGE)
    for name, shape in shapes.items():
        kind = Kind.Q8_0 if len(shape) == 2 else Kind.F32
        size = math.prod(shape) // 32 * 34 if len(shape) == 2 else math.prod(shape) * 4
        stored = names.get_name(name, try_suffixes=(".weight",))
        dtype = np.dtype(np.uint8 if len(shape) == 2 else np.float32)
        packed = (*shape[:-1], shape[-1] // 32 * 34) if len(shape) == 2 else shape
        writer.add_tensor_info(stored, packed, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for seed, shape in enumerate(shapes.values()):
        writer.write_tensor_data(blocks(shape, Kind.Q8_0, seed) if len(shape) == 2 else np.ones(shape, np.float32))
    writer.close()
    return file


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_gigabyte_of_gguf_takes_less_than_900_mb(tmp_path: Path) -> None:
    source = build_gguf(tmp_path / "llama.gguf")
    assert source.stat().st_size > 10**9
    words = ["-m", "aoconvert", "quantize", str(source), "--scheme", "int8wo", "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, sys.executable, *words, "--device", "cpu", "--json"],
        env={**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    code, peak = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    print("peak", peak / 1e6, json.loads(done.stdout)["seconds"])
    assert peak < 900 * 10**6
