"""``aoconvert repack`` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import build_llama

import aoconvert


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repack")
    (root / "source").mkdir()
    build_llama(root / "source")
    output = root / "out"
    aoconvert.quantize(
        root / "source", "int4wo", layout_device="cpu", output=output, group_size=32, device="cpu", min_quantized=0.0
    )
    return output


def test_it_says_what_it_did(call: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    done = call("repack", made, "--layout-device", "cuda", "-o", tmp_path / "a")
    assert done.code == 0
    assert "tile_packed_to_4d" in done.stdout
    assert done.stderr.startswith("warning: unconfirmed: ")
    document = json.loads(call("repack", made, "--layout-device", "cuda", "-o", tmp_path / "b", "--json").stdout)
    assert set(document) == {"output", "manifest", "layouts", "weights", "bytes_out", "unconfirmed", "seconds"}
    assert document["layouts"][0]["device"] == "cuda"
    assert Path(document["manifest"]).is_file()
    quiet = call("repack", tmp_path / "a", "--layout-device", "cpu", "-q")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, f"{tmp_path / 'a-cpu'}\n", "")


@pytest.mark.exhaustive
def test_a_fresh_process_says_nothing_of_what_it_imports(made: Path, tmp_path: Path) -> None:
    """torchao looks for a config's class through a set of packages, one of which logs: this seed has it come first."""
    command = [sys.executable, "-m", "aoconvert", "repack", str(made), "--layout-device", "cuda"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), "-q"],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stderr == ""


def test_errors_have_their_code(call: Callable[..., Any], made: Path, tmp_path: Path) -> None:
    assert call("repack", made).code == 2
    assert call("repack", made, "--layout-device", "tpu").code == 2
    nothing = call("repack", tmp_path, "--layout-device", "cuda")
    assert (nothing.code, len(nothing.stderr.splitlines())) == (3, 2)
    again = call("repack", made, "--layout-device", "cpu", "-o", tmp_path / "out")
    assert again.code == 3
    assert "already packed for cpu" in again.stderr
    inexact = call("repack", made, "--layout-device", "xpu", "-o", tmp_path / "out")
    assert inexact.code == 1
    assert inexact.stderr.startswith("error: model.layers.0.")
    assert list(tmp_path.iterdir()) == []
