"""What a card says of a benchmark: what is in the report of this very checkpoint, and no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cards.reading import read
from helpers.benches import NOTHING, write_bench

from aoconvert.cards import CardOptions, render

HEADING = "h2 What it costs to run"
REPO = "user/tiny-int8wo"


@pytest.fixture
def folder(converted: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("llama-chat"), tmp_path / "out"))


def page_of(folder: Path) -> Any:
    return read(render(folder, CardOptions(), repo_id=REPO).text)


def test_the_table(folder: Path) -> None:
    write_bench(
        folder,
        {},
        {"compile": True, "compile_seconds": 12.3},
        {"model": "source", "scheme": "bfloat16", "batch_size": 8},
        {"fused": True, "error": "it | cannot be <b>fused</b>", **NOTHING},
        {"fused": True, "error": "it | cannot be <b>fused</b>", **NOTHING},
    )
    page = page_of(folder)
    assert HEADING in page.headings
    assert page.headings.index(HEADING) == page.headings.index("h2 Size and error") + 1
    time = "250\u00a0ms (125\u00a0to\u00a0500)"
    for text in ("8 tokens", "1.50 MB", "400.00 MB", time, "compiled in 12 s", "4 sentences"):
        assert text in page.shown
    assert "original, bfloat16" in page.shown
    assert page.shown.count("Not measured, fused, int8wo: it | cannot be <b>fused</b>") == 1
    assert "Device cpu (A CPU), 2 threads, torch 9.9." in page.shown
    assert "median time of 3 runs" in page.shown and "on 2026-11-30" in page.shown
    assert "stopped" not in page.shown and "smallest size" not in page.shown
    assert "b>" not in "".join(page.html)
    assert f"aoconvert bench {REPO} --device cpu --runs 3 --tokens 8\n" in page.fences("bash")


def test_a_column_that_says_nothing_is_not_there(folder: Path) -> None:
    write_bench(folder, {}, {"model": "source", "scheme": "bfloat16"})
    table = page_of(folder).body.partition("What it costs")[2].partition("\n\n")[2].splitlines()
    assert table[0] == "| | one run | model memory | peak memory | time | per second |"
    assert "plain" not in table[2] and table[2].startswith("| **int8wo** | 8 tokens | 1.50 MB |")
    write_bench(folder, {}, {"batch_size": 8, "fused": True})
    table = page_of(folder).body.partition("What it costs")[2].partition("\n\n")[2].splitlines()
    assert table[0] == "| | | batch | one run | model memory | peak memory | time | per second |"
    assert table[3].startswith("| **int8wo** | fused | 8 | 8 tokens |")


def test_small_sizes_and_a_stop_are_said(folder: Path) -> None:
    write_bench(folder, {"unit": "denoising step"}, complete=False)
    shown = page_of(folder).shown
    assert "The benchmark was stopped before its end." in shown
    assert "the smallest size that it accepts" in shown


def test_without_a_report_of_this_checkpoint_nothing_is_said(folder: Path) -> None:
    write_bench(folder, manifest_sha256="0" * 64)
    assert HEADING not in page_of(folder).headings
    write_bench(folder, {"error": "no", **NOTHING})  # nothing ran
    assert HEADING not in page_of(folder).headings
    (folder / "aoconvert.bench.json").write_text("[1, 2")
    assert HEADING not in page_of(folder).headings
    (folder / "aoconvert.bench.json").unlink()
    assert HEADING not in page_of(folder).headings


@pytest.mark.parametrize(
    "command",
    [
        "aoconvert bench out --device cpu; rm -rf ~",
        "aoconvert bench out --token hf_x",
        "aoconvert bench out --trust-remote-code",
        "aoconvert bench out --size 1x1;id",
        "aoconvert bench out --source '../../x y'",
        "aoconvert push out",
        "curl example.com",
        "aoconvert bench 'out",
    ],
)
def test_a_command_that_aoconvert_did_not_write_is_not_shown(folder: Path, command: str) -> None:
    write_bench(folder, command=command)
    page = page_of(folder)
    assert HEADING in page.headings
    assert not any("aoconvert bench" in code for code in page.fences("bash"))


def test_a_report_by_anybody_is_shown_as_text(folder: Path) -> None:
    report = write_bench(folder).to_dict()
    report["environment"] = {"device": "](https://x.y) <script>", "peak": "*bold*\n# heading"}
    report["rows"][0] |= {"workload": "a | b", "scheme": "**x**"}
    (folder / "aoconvert.bench.json").write_text(json.dumps(report))
    page = page_of(folder)
    assert "](https://x.y) <script>" in page.shown and "*bold* # heading" in page.shown
    assert "a | b" in page.shown
    assert not any("x.y" in link for link in page.links)
