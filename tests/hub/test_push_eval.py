"""An evaluation goes up with the checkpoint that it measured, and its contact sheet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.evaluations import write_evaluation

from aoconvert.hub.contents import read_contents
from aoconvert.hub.types import PushOptions
from aoconvert.progress import Silent


def test_report_and_sheet_are_sent_where_they_belong_to_the_manifest(fresh: Callable[..., Path]) -> None:
    folder = fresh()
    options = PushOptions(token="hf_test", allow_unverified=True)
    (folder / "eval.png").write_bytes(b"a picture")
    alone = {file.path for file in read_contents(folder, "me/x", options, Silent()).files}
    write_evaluation(folder)
    sent = {file.path: file.content for file in read_contents(folder, "me/x", options, Silent()).files}
    assert sent.keys() - alone == {"aoconvert.eval.json", "eval.png"}
    assert sent["eval.png"] == b"a picture"
    write_evaluation(folder, manifest_sha256="0" * 64)
    assert {file.path for file in read_contents(folder, "me/x", options, Silent()).files} == alone
