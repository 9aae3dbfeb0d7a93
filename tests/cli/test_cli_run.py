"""A run as a process: interrupted, watched on a terminal, beside another one; and the demo."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import LLAMA, build_llama, build_sparse_llama
from helpers.documents import check_document
from helpers.forking import WITH_LIBRARIES, Forker

import aoconvert
from aoconvert import demo
from aoconvert.errors import PlanError
from aoconvert.progress import Silent

ROOT = Path(__file__).parents[2]
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "160"}
BIG = {**LLAMA, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 6, "vocab_size": 1024}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.35 GB of weights, all zero, which take no disk."""
    return build_sparse_llama(tmp_path_factory.mktemp("big") / "llama", BIG)


Start = Callable[..., "subprocess.Popen[str]"]


def command(source: Path, output: Path, *options: str) -> list[str]:
    words = ["quantize", source, "--scheme", "int8wo", "--device", "cpu", "-o", output, *options]
    return ["-m", "aoconvert", *map(str, words)]


@pytest.fixture
def start(forker: Forker) -> Start:
    """Start a ``quantize`` in a process of its own, which has its imports already."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def run(source: Path, output: Path, *options: str) -> "subprocess.Popen[str]":
        words = command(source, output, *options)
        return forker.popen(words, WITH_LIBRARIES, env=ENVIRONMENT, start_new_session=True, **pipes)

    return run


def wait_for_data(process: "subprocess.Popen[str]", output: Path) -> Path:
    """Until the unfinished folder holds some megabytes of weights."""
    partial = output.parent / f".{output.name}.aoconvert-partial"
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(f"ended too early: {process.communicate()}")
        if partial.is_dir() and sum(path.stat().st_size for path in partial.glob("*.bin*")) > 20 * 10**6:
            return partial
        time.sleep(0.01)
    raise AssertionError("no data after a minute")


@pytest.fixture
def running(big: Path, tmp_path: Path, start: Start) -> Iterator["subprocess.Popen[str]"]:
    process = start(big, tmp_path / "out")
    try:
        wait_for_data(process, tmp_path / "out")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=30)
    return process.returncode, stdout, stderr


def test_ctrl_c_while_another_wants_the_same_output(
    running: "subprocess.Popen[str]", big: Path, tmp_path: Path, start: Start
) -> None:
    running.send_signal(signal.SIGSTOP)  # it lives, and takes its time
    other = ended(start(build_llama(tmp_path / "small"), tmp_path / "out"))
    assert other[:2] == (3, "")
    owner = f"another aoconvert (process {running.pid})"
    assert other[2].splitlines()[0] == f"error: {owner} is writing to {tmp_path / 'out'}"
    assert len(other[2].splitlines()) == 2
    running.send_signal(signal.SIGCONT)
    running.send_signal(signal.SIGINT)
    code, stdout, stderr = ended(running)
    assert (code, stdout) == (130, "")
    kept = re.fullmatch(
        r"error: interrupted; (\d+) of 57 tensors are kept, run the same command again to continue\n"
        rf"hint: they are in {re.escape(str(tmp_path))}/\.out\.aoconvert-partial; --no-resume starts over\n",
        stderr,
    )
    assert kept, stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.aoconvert-partial", "small"]
    result = aoconvert.quantize(big, "int8wo", output=tmp_path / "out", device="cpu")
    assert result.resumed == int(kept[1]) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]


def test_sigterm_keeps_the_earlier_result(big: Path, tmp_path: Path, start: Start) -> None:
    output = tmp_path / "out"
    aoconvert.quantize(build_llama(tmp_path / "small"), "int8wo", output=output, device="cpu")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    process = start(big, output, "--overwrite", "--json")
    wait_for_data(process, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    process.send_signal(signal.SIGTERM)
    code, stdout, stderr = ended(process)
    assert (code, stderr) == (130, "")
    error = json.loads(stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("Interrupted", 130)
    assert re.fullmatch(
        r"interrupted; \d+ of 57 tensors are kept, run the same command again to continue", error["message"]
    )
    assert error["hint"].endswith("--no-resume starts over")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.aoconvert-partial", "out", "small"]


def test_another_run_after_a_killed_one_says_so_and_cleans_up(big: Path, tmp_path: Path, start: Start) -> None:
    """SIGKILL cannot be caught: no result appears; the next run is of another model."""
    output = tmp_path / "out"
    process = start(big, output)
    partial = wait_for_data(process, output)
    process.kill()
    process.communicate()
    assert partial.is_dir()
    assert not output.exists()
    code, _, stderr = ended(start(build_llama(tmp_path / "small"), output))
    assert (code, stderr) == (
        0,
        "warning: the earlier run's work cannot be used: the plan changed, the source changed\n",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]
    assert sorted(path.name for path in output.iterdir()) == [
        "aoconvert.json",
        "config.json",
        "generation_config.json",
        "pytorch_model.bin",
    ]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc to see what a process has loaded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_before_the_work(tmp_path: Path, number: signal.Signals) -> None:
    """While torch is being imported."""
    words = [sys.executable, *command(build_llama(tmp_path / "small"), tmp_path / "out")]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, env=ENVIRONMENT, start_new_session=True, **pipes)
    until = time.monotonic() + 60
    while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    assert ended(process) == (130, "", "error: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def on_terminal(forker: Forker, arguments: list[str], **changes: str) -> tuple[int, str, str]:
    """Run with stderr on a terminal: exit code, stdout, and what the terminal saw."""
    ours, theirs = pty.openpty()
    outputs: Any = {"stdout": subprocess.PIPE, "stderr": theirs, "text": True}
    process = forker.popen(arguments, WITH_LIBRARIES, env={**ENVIRONMENT, **changes}, **outputs)
    os.close(theirs)
    seen = b""
    while True:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                chunk = os.read(ours, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        elif process.poll() is not None:
            break
    os.close(ours)
    stdout: Any = process.communicate()[0]
    return process.returncode, stdout, seen.decode()


def test_progress_on_a_terminal(forker: Forker, tmp_path: Path) -> None:
    source = build_sparse_llama(tmp_path / "llama", {**BIG, "num_hidden_layers": 3})
    code, stdout, seen = on_terminal(forker, command(source, tmp_path / "out", "--json"), COLUMNS="80")
    assert code == 0
    assert json.loads(stdout)["output"] == str(tmp_path / "out")
    shown = _CONTROL.sub("", seen.replace("\r", "\n")).splitlines()
    assert shown[0].startswith(f"quantize {source}"[:70])  # before anything that takes long
    bars = [line for line in shown if line.lstrip().startswith("quantize ") and "MB/s" in line]
    assert bars
    for line in bars:
        assert len(line.rstrip()) <= 80, line
        assert re.search(r"\d+:\d\d:\d\d|-:--:--", line), line  # the time left is the last figure
    for part in ("quantize", "MB", "/s", "0:00:", "_proj.weight"):
        assert part in seen, seen[-2000:]
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l"), "the cursor is still hidden"


def test_no_progress_on_a_terminal_when_told_so(forker: Forker, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "small")
    code, _, seen = on_terminal(forker, command(source, tmp_path / "out", "--no-progress"))
    assert (code, seen) == (0, "")


def test_error_under_a_progress_bar(forker: Forker, tmp_path: Path) -> None:
    import torch
    from helpers.checkpoints import llama_tensors

    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    code, stdout, seen = on_terminal(forker, command(build_llama(tmp_path / "nan", tensors=tensors), tmp_path / "out"))
    assert (code, stdout) == (1, "")
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l"), "the cursor is still hidden"
    lines = [line for line in seen.replace("\r", "\n").splitlines() if "holds NaN or infinity" in line]
    assert len(lines) == 1
    message = "\x1b[31merror:\x1b[0m model.layers.1.mlp.up_proj.weight holds NaN"
    assert lines[0].removeprefix("\x1b[?25h").startswith(message), lines
    assert not (tmp_path / "out").exists()


def test_demo(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "aoconvert", "demo", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    check_document("demo", result)
    checks = {check["name"]: check for check in result["verification"]["checks"]}
    assert {check["status"] for check in checks.values()} == {"passed"}
    assert "CogVideoXPipeline" in checks["reload"]["detail"]
    assert "the card's example ran" in checks["forward"]["detail"]
    assert sorted(Path(path).name for path in result["card"]) == ["README.md", "sqnr.svg"]
    assert (tmp_path / "demo" / "out" / "aoconvert.json").is_file()
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["out", "source"]


def test_a_demo_deletes_no_pipeline_of_somebody_else(tmp_path: Path) -> None:
    """A folder with a ``source`` of the user's own is no earlier demo, though it looks like one."""
    source = tmp_path / "source"
    demo.build_pipeline(source)
    (source / "notes.txt").write_text("mine")
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    trained = weights.read_bytes()[:-1] + b"\x01"
    weights.write_bytes(trained)
    with pytest.raises(PlanError, match=r"notes\.txt, transformer/diffusion_pytorch_model\.safetensors"):
        demo.run(tmp_path, "int8wo", Silent())
    assert weights.read_bytes() == trained
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
