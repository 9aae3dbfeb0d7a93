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
