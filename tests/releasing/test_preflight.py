"""What is in the way of a release is said before any work; a run that was killed has not worked in vain."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault
from helpers.checkpoints import build_llama

from aoconvert.errors import PlanError
from aoconvert.releasing import Record, release
from aoconvert.releasing.preflight import hold_root
from aoconvert.releasing.record import VariantRecord, failure_of
from aoconvert.releasing.variants import PlannedVariant

FILE = """
name = "Tiny"
source = "model"
repo = "{owner}/tiny-{variant}"
license = "mit"
defaults = { device = "cpu", min_quantized = 0 }
variants = [{ scheme = "int8wo" }]
"""
TOKEN = "hf_theTokenOfTheTests0123456789abcdefgh"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    build_llama(tmp_path / "model")
    path = tmp_path / "tiny.toml"
    path.write_text(FILE)
    return path


def made(file: Path, **options: Any) -> tuple[Record, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    record = release(file, on_event=events.append, **{"skip_push": True, "output_root": file.parent / "out", **options})
    return record, events


def refused(file: Path, **options: Any) -> str:
    """The only problem; nothing was made or changed."""
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(PlanError) as caught:
        made(file, **options)
    assert sorted(file.parent.rglob("*")) == before
    [line] = caught.value.problems
    assert caught.value.hint is None or "--output-root" in caught.value.hint
    return line


def test_a_place_that_cannot_hold_it(file: Path) -> None:
    folder = file.parent
    (folder / "text").write_text("x")
    assert refused(file, output_root=folder / "text/below").endswith(f"{folder}/text is not a folder")
    assert refused(file, output_root=folder / ("x" * 300)).endswith("File name too long")
    (folder / "out/tiny/int8wo").mkdir(parents=True)
    (folder / "out/tiny/int8wo/notes.txt").write_text("mine")
    assert "int8wo exists and is not empty: it holds notes.txt" in refused(file)
    assert "notes.txt" in refused(file, dry_run=True)
    (folder / "out/tiny/release.json").mkdir()
    assert refused(file).endswith("release.json is not a file")
    (folder / "out/tiny/release.json").rmdir()
    (folder / "out/tiny").rename(folder / "out/other")
    (folder / "out/tiny").write_text("x")
    assert refused(file).endswith("out/tiny is not a folder")


def test_one_folder_for_two_releases(file: Path) -> None:
    Record(name="Another", models=(), ok=True, variants=()).write(file.parent / "out/tiny")
    assert refused(file) == f"{file.parent}/out/tiny holds the release 'Another', and this one is 'Tiny'"
    with hold_root(file.parent / "out2/tiny"):
        line = refused(file, output_root=file.parent / "out2")
        assert line == f"another aoconvert makes a release in {file.parent}/out2/tiny"


def test_killed_before_it_could_write_down_what_was_made(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(PlannedVariant, "note_made", end)
        with pytest.raises(SystemExit):
            made(file)
    weights = file.parent / "out/tiny/int8wo/pytorch_model.bin"
    before = weights.stat()
    assert [path.name for path in weights.parents[1].glob("*.json")] == ["int8wo.begun.json"]
    record, events = made(file)
    assert record.ok and weights.stat().st_mtime_ns == before.st_mtime_ns
    assert [event["again"] for event in events if event["event"] == "quantized"] == [False]
    assert sorted(path.name for path in weights.parents[1].glob("*.json")) == ["int8wo.made.json", "release.json"]

    # what was begun and not finished is no reason to keep what lay there before
    file.write_text(FILE.replace('"int8wo"', '"int8wo", include_embeddings = true'))
    with monkeypatch.context() as patched:
        patched.setattr("aoconvert.api.quantize", end)
        with pytest.raises(SystemExit):
            made(file)
    _, events = made(file)
    assert [event["again"] for event in events if event["event"] == "quantized"] == [True]


def test_who_may_not_publish_is_told_before_the_work(hub_client: HubClient, file: Path, tmp_path: Path) -> None:
    state, out = hub_client.hub.state, tmp_path / "out"
    state.add_user("me", TOKEN)
    state.create_repo("me/tiny-int8wo", private=True)
    state.commit("me/tiny-int8wo", {".gitattributes": b""})

    def run(*more: str, token: str | None = TOKEN, text: str = FILE) -> tuple[int, list[str]]:
        file.write_text(text)
        done = hub_client.command("release", str(file), "--output-root", str(out), "--json", *more, token=token)
        assert done.stderr == ""
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert not out.exists()
        return done.returncode, lines[-1]["error"]["problems"]

    assert run("--owner", "me", token=None) == (5, ["not logged in to the Hub: there is no token"])
    code, [line] = run("--owner", "me", token="hf_another")
    assert (code, line) == (5, "Hugging Face Hub: the Hub does not accept the token (401)")
    code, [line] = run("--owner", "others")
    assert code == 5 and "others/tiny-int8wo does not exist (or is hidden), and me may not create repos" in line
    code, [line] = run("--owner", "me", text=FILE.replace("license", "private = false\nlicense"))
    assert code == 5 and line.startswith("me/tiny-int8wo is private, and --public was asked for")
    code, [line] = run("--owner", "a/b")
    assert code == 3 and line.startswith("int8wo: 'a/b/tiny-int8wo' is not a name for a repo")
    models = FILE.replace(
        'source = "model"', 'models = [{ source = "me/no" }, { source = "model" }, { source = "me/a" }]'
    )
    code, lines = run("--owner", "me", text=models)
    assert code == 5 and [line.partition(",")[0] for line in lines] == [
        "no: the Hub has no model me/no",
        "a: the Hub has no model me/a",
    ]

    # a Hub that fails now may not fail when there is something to publish
    hub_client.hub.faults.append(Fault("/whoami", status=503, times=1))
    file.write_text(FILE)
    done = hub_client.command("release", str(file), "--output-root", str(out), "--owner", "me", token=TOKEN)
    assert done.returncode == 0, done
    assert "whether the repos can be written is not known yet: " in done.stderr
    assert state.resolve("me/tiny-int8wo", "main")


def test_files_of_an_earlier_run_that_are_gone_or_changed(file: Path) -> None:
    made(file)
    weights = file.parent / "out/tiny/int8wo/pytorch_model.bin"
    content = weights.read_bytes()
    weights.unlink()
    record, events = made(file)
    assert record.ok and weights.read_bytes() == content
    assert [event["again"] for event in events if "again" in event] == [True, True]

    # other times of change, as after a copy: looked at once more, and nothing is wrong
    os.utime(weights)
    record, events = made(file)
    assert record.ok and [event["again"] for event in events if "again" in event] == [False, True]

    weights.write_bytes(content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:])
    record, events = made(file)
    assert (record.exit_code, record.variants[0].status) == (4, "failed")
    error = record.variants[0].error
    assert error is not None and "pytorch_model.bin" in error.message and f"remove {weights.parent}" in str(error.hint)


def test_a_code_says_whether_work_was_done() -> None:
    """3 is for what is refused before any work: a variant that is refused later is a failure."""
    refusal = failure_of(PlanError(["full"]))
    failed = VariantRecord(name="a", model="m", scheme="a", status="failed", error=refusal)
    assert Record(name="x", models=(), ok=False, variants=(failed,)).exit_code == 1
