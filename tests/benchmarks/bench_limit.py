"""A checkpoint of 24 GB, converted inside 1.5 GB of memory that the kernel enforces.

    sudo python tests/benchmarks/bench_limit.py --workdir bench-work

The source is a Llama of 13 layers as wide as Llama-3.1-70B (its embedding alone takes 2.1 GB), a sparse safetensors
file. A memory cgroup (v1 or v2, which takes root) holds the process and the page cache that it makes; an address space
limit (``ulimit -v``) would count mapped libraries and thread stacks that are never touched. Swap is off for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 13,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def build(folder: Path) -> int:
    """Write config and a sparse weights file; returns its size in bytes."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            header[name] = {
                "dtype": "BF16",
                "shape": list(tensor.shape),
                "data_offsets": [end, end + 2 * tensor.numel()],
            }
            end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


@contextlib.contextmanager
def limited(nbytes: int):
    """A memory cgroup; gives its folder and the names of its files for: processes, highest use."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (v1 if v1.is_dir() else v2) / f"aoconvert-{os.getpid()}"
    group.mkdir()
    try:
        if v1.is_dir():
            (group / "memory.limit_in_bytes").write_text(str(nbytes))
            (group / "memory.swappiness").write_text("0")
            yield group, "memory.max_usage_in_bytes"
        else:
            (group / "memory.max").write_text(str(nbytes))
            (group / "memory.swap.max").write_text("0")
            yield group, "memory.peak"
    finally:
        group.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("bench-work"))
    parser.add_argument("--scheme", default="int8wo")
    parser.add_argument("--limit", type=int, default=1_500_000_000)
    options = parser.parse_args()
    source, out = options.workdir / "llama-24gb", options.workdir / "llama-out"
    size = build(source)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "aoconvert", "quantize", str(source), "--scheme", options.scheme]
    command += ["--device", "cpu", "-o", str(out), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    with limited(options.limit) as (group, peak):
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        began = time.perf_counter()
        done = subprocess.run(
            ["sh", "-c", enter, "sh", *command], env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - began
        used = int((group / peak).read_text())
    if done.returncode:
        print(f"failed ({done.returncode}): {done.stderr[-2000:]}")
        return 1
    result = json.loads(done.stdout)
    written = result["bytes_out"]
    print(
        f"{size / 1e9:.1f} GB to {written / 1e9:.1f} GB in {seconds:.0f} s inside {options.limit / 1e9:.1f} GB: "
        f"peak RSS {result['peak_host_bytes'] / 1e6:.0f} MB, highest use with page cache {used / 1e6:.0f} MB"
    )
    check = [sys.executable, "-m", "aoconvert", "verify", str(out), "--no-reload", "-q"]
    print("verify --no-reload:", subprocess.run(check, env=environment, capture_output=True, text=True).stdout.strip())
    shutil.rmtree(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
