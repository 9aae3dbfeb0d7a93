"""``eval`` on the command line, and at the end of ``quantize``: in fresh interpreters once, else in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.documents import check_document
from helpers.evaluating import Line, asked

Call = Callable[..., Any]

__all__ = ["asked"]


@pytest.mark.fresh
def test_quantize_and_eval_in_fresh_interpreters(call: Call, llama: Path, tmp_path: Path) -> None:
    done = call("quantize", llama, "--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out", "--eval", "--json")
    assert done.code == 0, done
    found = json.loads(done.stdout)
    check_document("quantize", found)
    report = json.loads((tmp_path / "out" / "aoconvert.eval.json").read_text())
    assert report == found["evaluation"]
    assert report["components"][0]["metrics"]["kl_mean"] > 0
    assert (report["data"]["samples"], report["data"]["kind"]) == (8, "generated")


def test_a_gate_that_is_missed(call: Call, llama: Path, tmp_path: Path, asked: list[Line]) -> None:
    out = tmp_path / "out"
    call("quantize", llama, "--scheme", "int8wo", "--device", "cpu", "-o", out)
    few = ("--samples", 1, "--tokens", 8)
    said = call("eval", out, "--source", llama, *few, "--max-kl", 0, "--min-agreement", 0)
    assert (said.code, said.stderr) == (4, "")
    assert "missed" in said.stdout and "passed" in said.stdout
    assert "perplexity of the original" in said.stdout
    assert call("eval", out, "--source", llama, *few, "-q").stdout == "ok\n"
    assert call("eval", out, "--source", llama, *few, "--json", "--no-layers").code == 0
    refused = call("eval", out)
    assert (refused.code, refused.stderr.splitlines()[0]) == (
        2,
        "error: the manifest names no repo as the source",
    )
    assert call("eval", out, "--source", tmp_path / "absent").code == 2
    assert call("eval", out, "--source", llama, "--tokens", 1).code == 2
