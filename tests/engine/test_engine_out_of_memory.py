"""The host's memory runs out in the middle of a run: one line, and the next run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aoconvert.errors import AoconvertError, QuantizeError, is_out_of_memory

# The plan is made outside the limit: what a run needs beside the imports is what is limited.
SCRIPT = """
import json, resource, sys
from pathlib import Path
import aoconvert
from aoconvert.engine.convert import run
from aoconvert.errors import AoconvertError
from aoconvert.progress import Silent
source, output, megabytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
plan = aoconvert.plan(source, "int8wo", output=output, device="cpu", min_quantized=0.0)
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
if megabytes:
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
try:
    answer = ["whole", run(plan, Silent(), command="").resumed, ""]
except AoconvertError as error:
    answer = [type(error).__name__, error.message, error.hint]
print("\\n" + json.dumps(answer))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding has 64 MB."""
    import transformers

    folder = tmp_path_factory.mktemp("large") / "model"
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def attempt(source: Path, output: Path, megabytes: int) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), str(output), str(megabytes)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_it_is_said_in_one_line_and_the_next_run_goes_on(large: Path, tmp_path: Path) -> None:
    kind, message, hint = attempt(large, tmp_path / "out", 70)
    assert kind == "HostMemoryError"
    assert message.startswith("out of memory: this run needs about ")
    assert hint.startswith("close other programs or raise the limit; on fewer cores (taskset) a run needs less")
    assert not (tmp_path / "out").exists()
    assert attempt(large, tmp_path / "out", 20)[0] == "HostMemoryError"  # keeps what there is
    kept = (tmp_path / ".out.aoconvert-partial").exists()
    kind, resumed, _ = attempt(large, tmp_path / "out", 0)
    assert kind == "whole"
    assert (resumed > 0) == (kept and "tensors are kept" in hint)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_what_means_that_memory_ran_out() -> None:
    torch_says = RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    for error in (
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ImportError("libx.so: failed to map segment from shared object"),
        torch_says,
        raised(QuantizeError("w: int8wo failed"), torch_says),
    ):
        assert is_out_of_memory(error)
    for other in (OSError(28, "No space left"), RuntimeError("shape"), raised(AoconvertError("x"), ValueError("y"))):
        assert not is_out_of_memory(other)
