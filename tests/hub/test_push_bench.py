"""A benchmark goes up with the checkpoint that it measured, without a path of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from helpers.benches import write_bench

from aoconvert.hub.contents import read_contents
from aoconvert.hub.types import PushOptions
from aoconvert.progress import Silent


def test_the_report_is_sent(fresh: Callable[..., Path]) -> None:
    folder = fresh()
    options = PushOptions(token="hf_test", allow_unverified=True)
    before = read_contents(folder, "me/x", options, Silent())
    write_bench(folder, {"error": f"{folder.resolve()}/x is missing"}, {}, path=str(folder))
    sent = read_contents(folder, "me/x", options, Silent())
    new = {file.path: file for file in sent.files if file.path not in {old.path for old in before.files}}
    assert [*new] == ["aoconvert.bench.json"]
    content = new["aoconvert.bench.json"].content
    assert isinstance(content, bytes)
    report = json.loads(content)
    assert (report["path"], report["rows"][0]["error"]) == ("me/x", "./x is missing")
    assert sent.problems == before.problems
    assert not any("aoconvert.bench.json" in line for line in sent.warnings)


def test_the_report_of_another_checkpoint_stays(fresh: Callable[..., Path]) -> None:
    folder = fresh()
    write_bench(folder, manifest_sha256="0" * 64)
    sent = read_contents(folder, "me/x", PushOptions(token="hf_test", allow_unverified=True), Silent())
    assert "aoconvert.bench.json" not in [file.path for file in sent.files]
