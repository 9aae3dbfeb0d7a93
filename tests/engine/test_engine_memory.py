"""Memory of a whole conversion, and of a verification, measured by the kernel: it does not grow with the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import aoconvert

REPO = Path(__file__).resolve().parents[2]
BUILD = REPO / "tests" / "benchmarks" / "models.py"
LIMIT = 900 * 10**6

# A child's peak starts at the size of the process that starts it, and pytest is large by now: this one is small.
MEASURE = """
import json, os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
json.dump([os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit], open(os.environ["MEASURED"], "w"))
"""


def run(words: list[str], folder: Path) -> tuple[str, int]:
    """Run a command; its standard output and its peak resident set in bytes."""
    measured = folder / "measured.json"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "MEASURED": str(measured)}
    command = [sys.executable, "-S", "-c", MEASURE, sys.executable, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    code, peak = json.loads(measured.read_text())
    assert code == 0, done.stderr
    return done.stdout, peak


def build(folder: Path, *layers: int) -> list[Path]:
    """CogVideoX transformers of real width."""
    sources = [folder / f"source-{count}" for count in layers]
    calls = [f"models.build(Path({str(source)!r}), {count})" for source, count in zip(sources, layers, strict=True)]
    lines = ["import sys", "from pathlib import Path", f"sys.path.insert(0, {str(BUILD.parent)!r})", "import models"]
    run(["-c", "\n".join([*lines, *calls])], folder)
    return sources


@dataclass(frozen=True)
class Conversion:
    """The peak of a conversion in bytes, what it printed, and its output; the source is gone."""

    peak: int
    printed: dict[str, Any]
    output: Path


def convert(source: Path) -> Conversion:
    folder, output = source.parent, source.with_name(f"{source.name}-out")
    words = ["-m", "aoconvert", "quantize", str(source), "--scheme", "int8wo", "--output", str(output), "--json"]
    printed, peak = run([*words, "--device", "cpu"], folder)
    result = json.loads(printed)
    assert [path.name for path in output.glob("*.bin*")] == ["diffusion_pytorch_model.bin"]
    assert (output / "diffusion_pytorch_model.bin").stat().st_size > result["bytes_out"]
    shutil.rmtree(source)
    return Conversion(peak, result, output)


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Conversion, Conversion]]:
    """Of a model, and of one twice as large."""
    folder = tmp_path_factory.mktemp("memory")
    small, large = build(folder, 5, 10)
    yield convert(small), convert(large)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit was measured on Linux")
def test_peak_does_not_grow_with_the_model(conversions: tuple[Conversion, Conversion]) -> None:
    one, two = conversions
    assert 5.5e8 < one.printed["bytes_in"] < 6.5e8
    assert 1.1e9 < two.printed["bytes_in"] < 1.2e9
    if torch.version.cuda is None:  # a CUDA build of torch alone takes 300 MB more
        assert one.peak < LIMIT
    assert two.peak < 1.1 * one.peak
    # what --json and the manifest say is what the kernel says; the interpreter still has to shut down
    assert abs(two.printed["peak_host_bytes"] / two.peak - 1) < 0.02


def peaks(folder: Path) -> tuple[int, int]:
    """Peak memory in bytes of a verification without reload: of its own process, and of the largest it started."""
    script = (
        "import aoconvert, resource, sys\n"
        "assert aoconvert.verify(sys.argv[1], reload=False).ok\n"
        "own = [int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')][0]\n"
        "print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    own, child = (int(number) * 1024 for number in done.stdout.split()[-2:])
    return own, child


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_verification_without_reload_does_not_hold_the_model(
    conversions: tuple[Conversion, Conversion], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Files, pickles, versions and load: a file of 570 MB takes little more than a tiny one."""
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=tmp_path / "tiny", device="cpu")
    folder = conversions[1].output
    size = (folder / "diffusion_pytorch_model.bin").stat().st_size
    assert size > 500e6
    large, tiny = peaks(folder), peaks(tmp_path / "tiny")
    assert large[0] - tiny[0] < 0.1 * size
    assert large[1] - tiny[1] < 0.5 * size


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
@pytest.mark.parametrize(
    "scheme", ["int8wo", "float8wo", "int4dq", "int4wo", "float8dq", "float8dq_row", "float8dq_block", "mxfp8", "nvfp4"]
)
def test_needs_are_what_a_run_takes(scheme: str, tmp_path: Path) -> None:
    """Whatever has to stay together, rows or all of a weight, within a fifth."""
    [source] = build(tmp_path, 5)
    words = [str(source), "--scheme", scheme, "--output", str(tmp_path / "out"), "--device", "cpu", "--json"]
    planned = json.loads(run(["-m", "aoconvert", "plan", *words], tmp_path)[0])["needs"]["host_peak_bytes"]
    peak = run(["-m", "aoconvert", "quantize", *words], tmp_path)[1]
    assert 0.8 < planned / peak < 1.2, (planned, peak)
