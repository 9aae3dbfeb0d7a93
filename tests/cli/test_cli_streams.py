"""Streams that are full or closed, and names that are shortened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aoconvert.cli.bar import shorten
from aoconvert.cli.streams import shows_color

ROOT = Path(__file__).parents[2]


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
    assert done.returncode == 1


@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-"])
def test_stderr_that_is_full_or_closed(redirection: str) -> None:
    done = shell(f"aoconvert plan ./absent --scheme int8wo {redirection}")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_color_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(terminal, "w") as stream, Path(os.devnull).open("w") as nowhere:
        assert shows_color(stream)
        assert not shows_color(nowhere)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not shows_color(stream)
        monkeypatch.setenv("NO_COLOR", "")
        monkeypatch.setenv("TERM", "dumb")
        assert not shows_color(stream)
    os.close(controller)


@pytest.mark.parametrize(
    ("room", "shown"), [(40, "model.layers.11.mlp.up_proj.weight"), (15, "…up_proj.weight"), (1, ""), (-3, "")]
)
def test_a_long_name_is_shortened_from_its_start(room: int, shown: str) -> None:
    assert shorten("model.layers.11.mlp.up_proj.weight", room) == shown
