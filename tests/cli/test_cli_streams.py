"""Streams that are full, closed or 80 columns wide, and what is on the screen first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import build_sparse_llama
from test_cli_run import BIG, command, on_terminal

from aoconvert.cli.bar import shorten

ROOT = Path(__file__).parents[2]
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shell(line: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    words = ["bash", "-c", line.replace("aoconvert", f"{sys.executable} -m aoconvert", 1)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-"])
@pytest.mark.parametrize("arguments", ["schemes", "schemes --json", "plan --help"])
def test_stdout_that_is_full_or_closed(arguments: str, redirection: str) -> None:
    """There is nobody to tell: the exit code says it."""
    done = shell(f"aoconvert {arguments} {redirection}")
    assert done.stderr == ""
    assert done.returncode == (0 if (arguments, redirection) == ("plan --help", ">&-") else 1)  # click's own answer


@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-"])
def test_stderr_that_is_full_or_closed(redirection: str) -> None:
    done = shell(f"aoconvert plan ./absent --scheme int8wo {redirection}")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_a_line_of_progress_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_sparse_llama(tmp_path / "llama", {**BIG, "num_hidden_layers": 2})
    words = command(source, tmp_path / "out")
    code, _, seen = on_terminal(["env", "COLUMNS=80", *words])
    assert code == 0
    shown = _CONTROL.sub("", seen.replace("\r", "\n")).splitlines()
    assert shown[0].startswith(f"quantize {source}"[:70])  # before anything that takes long
    bars = [line for line in shown if line.lstrip().startswith("quantize ") and "MB/s" in line]
    assert bars
    for line in bars:
        assert len(line.rstrip()) <= 80, line
        assert re.search(r"\d+:\d\d:\d\d|-:--:--", line), line  # the time left is the last figure
    assert any("proj.weight" in line for line in bars), bars


@pytest.mark.parametrize(
    ("room", "shown"), [(40, "model.layers.11.mlp.up_proj.weight"), (15, "…up_proj.weight"), (1, ""), (-3, "")]
)
def test_a_long_name_is_shortened_from_its_start(room: int, shown: str) -> None:
    assert shorten("model.layers.11.mlp.up_proj.weight", room) == shown
