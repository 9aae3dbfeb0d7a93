"""A release: every variant made, judged and published, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_hub.fixtures import HubClient
from helpers.checkpoints import build_llama
from helpers.documents import check_document

import aoconvert
from aoconvert.errors import AoconvertError, PlanError, UsageError
from aoconvert.releasing import Record, release
from aoconvert.releasing.record import Failure, VariantRecord, failure_of, read_record

FILE = """
name = "Tiny"
source = "model"
repo = "{owner}/tiny-{variant}"
license = "mit"

[defaults]
device = "cpu"
min_quantized = 0

[[variants]]
scheme = "int8wo"

[[variants]]
scheme = "intx2wo"

[gates]
min_sqnr_db = 20
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
    options = {"skip_push": True, "output_root": file.parent / "made", **options}
    return release(file, on_event=events.append, **options), events


def done(events: list[dict[str, Any]]) -> dict[str, list[bool]]:
    """Variant → whether each step was done again."""
    found: dict[str, list[bool]] = {}
    for event in events:
        if "again" in event:
            found.setdefault(event["variant"], []).append(event["again"])
    return found


def test_a_gate_holds_one_back_and_nothing_is_done_twice(file: Path) -> None:
    record, events = made(file)
    status = {variant.name: variant.status for variant in record.variants}
    assert (record.exit_code, status) == (4, {"int8wo": "made", "intx2wo": "gate_failed"})
    [missed] = [gate for gate in record.variants[1].gates if not gate.passed]
    assert missed.name == "min-sqnr-db" and missed.value == record.variants[1].worst_sqnr_db
    assert missed.value is not None and missed.value < missed.limit == 20
    assert done(events) == {"int8wo": [True, True], "intx2wo": [True, True]}
    root = file.parent / "made/tiny"
    assert json.loads((root / "release.json").read_text()) == record.to_dict()
    # the same files as quantize alone
    alone = aoconvert.quantize(
        file.parent / "model", "int8wo", output=file.parent / "alone", device="cpu", min_quantized=0
    )
    name = "pytorch_model.bin"
    assert (alone.output / name).read_bytes() == (root / "int8wo" / name).read_bytes()

    assert [(root / name / "release.json").exists() for name in status] == [True, False]
    page = (root / "release.html").read_text()
    assert all(each in page for each in ("1 made, not published, 1 gate missed", f"min-sqnr-db: {missed.value:.4g}"))

    record, events = made(file)
    assert done(events) == {"int8wo": [False, False], "intx2wo": [False, False]}

    # a looser gate is judged anew, nothing is made again
    looser = FILE.replace("min_sqnr_db = 20", "min_sqnr_db = 1")
    file.write_text(looser.replace('"int8wo"', '"int8wo"\ninclude_embeddings = true'))
    record, events = made(file)
    assert record.ok and record.exit_code == 0
    assert done(events) == {"int8wo": [True, True], "intx2wo": [False, False]}
    for own, other in (("int8wo", "intx2wo"), ("intx2wo", "int8wo")):
        card = (root / own / "README.md").read_text()
        assert f"| **{own}** (this one) | " in card and f"| {other} | `{other}` | " in card

    record, events = made(file, only=("intx*",))
    assert [variant.status for variant in record.variants] == ["skipped", "made"]
    assert {event["variant"] for event in events} == {"intx2wo"}
    assert "| int8wo | `int8wo` | " in (root / "intx2wo" / "README.md").read_text()


def test_problems_of_all_variants_come_before_any_work(file: Path) -> None:
    text = FILE.replace('scheme = "int8wo"', 'scheme = "int8wo"\nskip = ["nowhere"]').replace("intx2wo", "nosuch")
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        made(file, skip_push=False)
    lines = caught.value.problems
    assert [line.partition(":")[0] for line in lines] == ["int8wo", "int8wo", "nosuch", "nosuch"]
    assert "no owner" in lines[0] and "nowhere" in lines[1] and "nosuch" in lines[3]
    assert not (file.parent / "made").exists()
    with pytest.raises(UsageError, match=r"--only fp4: tiny\.toml has no such variant"):
        made(file, only=("fp4",))


def test_a_gate_is_never_left_out(file: Path) -> None:
    file.write_text(FILE + "max_kl = 0.1\n")
    with pytest.raises(PlanError, match=r"int8wo: the gates max_kl need an evaluation") as caught:
        made(file, evaluate=False)
    assert len(caught.value.problems) == 2 and caught.value.hint == "omit --no-eval"
    assert not (file.parent / "made").exists()


def test_a_failure_of_a_variant_that_was_not_asked_for_is_not_this_runs() -> None:
    failure = Failure(type="HubError", message="no", hint=None, exit_code=5)
    variants = [
        VariantRecord(name="a", model="m", scheme="a", status=status, error=failure) for status in ("failed", "skipped")
    ]
    codes = [
        Record(name="x", models=(), ok=ok, variants=(one,)).exit_code
        for ok, one in zip((False, True), variants, strict=True)
    ]
    assert codes == [5, 0]


def test_a_record_with_a_failure_without_a_hint_is_read_again(tmp_path: Path) -> None:
    """A later run would else forget where its variants are."""
    failure = failure_of(AoconvertError("no"))
    variant = VariantRecord(name="a", model="m", scheme="a", status="failed", error=failure)
    record = Record(name="x", models=(), ok=False, variants=(variant,))
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    check_document("release", {"event": "summary", **record.to_dict()})


def test_a_dry_run_writes_nothing(file: Path) -> None:
    record, events = made(file, dry_run=True)
    assert [event["event"] for event in events] == ["planned", "planned"]
    assert all(event["needs"]["disk_bytes"] > 0 for event in events)
    assert record.ok and not (file.parent / "made").exists()
    assert [variant.status for variant in record.variants] == ["planned", "planned"]
    assert [variant.disk_bytes for variant in record.variants] == [event["needs"]["disk_bytes"] for event in events]
    assert all(variant.seconds_guess and 3 < variant.seconds_guess < 4 for variant in record.variants)
    real, _ = made(file, only=("int8wo",))
    assert record.variants[0].size_bytes == real.variants[0].size_bytes


def test_it_is_published_and_then_unchanged(hub_client: HubClient, file: Path, tmp_path: Path) -> None:
    """By the documented events and exit codes alone, as a script has it."""
    hub_client.hub.state.add_user("me", TOKEN)
    file.write_text(FILE.replace('[[variants]]\nscheme = "intx2wo"\n', ""))
    summary = tmp_path / "summary.md"
    command = ["release", str(file), "--owner", "me", "--output-root", str(tmp_path / "out"), "--json"]
    env = {"GITHUB_STEP_SUMMARY": str(summary)}
    ran = hub_client.command(*command, token=TOKEN, env=env)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0, ran.stderr
    for line in lines:
        check_document("release-event", line)
    names = ["planned", "variant_started", "quantized", "verified", "pushed", "card_updated", "summary"]
    assert [line["event"] for line in lines if line["event"] != "progress"] == names
    told = [(line["variant"], line["stage"]) for line in lines if line["event"] == "progress"]
    assert set(told) == {("int8wo", stage) for stage in ("quantize", "copy", "hash", "upload")}
    assert len(told) <= 20 * 6
    [variant] = lines[-1]["variants"]
    assert (variant["status"], variant["repo_id"]) == ("pushed", "me/tiny-int8wo")
    # the commit is the one with the weights; a younger one has the record, which names it
    [pushed] = [line for line in lines if line["event"] == "pushed"]
    head = hub_client.hub.state.resolve("me/tiny-int8wo", "main")
    assert variant["commit"] == pushed["commit"] != head
    record = json.loads(hub_client.hub.state.read("me/tiny-int8wo", "release.json"))
    assert [each["commit"] for each in record["variants"]] == [variant["commit"]]
    assert "| `int8wo` | pushed |" in summary.read_text()
    ran = hub_client.command(*command, token=TOKEN)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert (ran.returncode, lines[-2]["event"], lines[-1]["variants"][0]["status"]) == (0, "unchanged", "unchanged")
    assert lines[-1]["variants"][0]["commit"] == variant["commit"]
    assert hub_client.hub.state.resolve("me/tiny-int8wo", "main") == head


def test_a_source_on_the_hub(hub_client: HubClient, file: Path, tmp_path: Path) -> None:
    """It is planned before it is fetched, and its commit says on any machine that a variant is made already."""
    state = hub_client.hub.state
    state.create_repo("org/tiny")
    state.commit("org/tiny", {path.name: path for path in (file.parent / "model").iterdir()})
    file.write_text(FILE.replace('source = "model"', 'source = "org/tiny"').replace("[gates]\nmin_sqnr_db = 20\n", ""))
    command = ["release", str(file), "--only", "int8wo", "--skip-push", "--output-root", str(tmp_path / "o"), "--json"]
    steps = []
    for home in ("one", "another", "one"):
        if len(steps) == 4:
            state.commit("org/tiny", {"README.md": b"# Tiny"})
        ran = hub_client.command(*command, env={"HF_HOME": str(tmp_path / home)})
        assert ran.returncode == 0, ran.stdout
        lines = [json.loads(line) for line in ran.stdout.splitlines()]
        steps += [(line["event"], line["again"]) for line in lines if "again" in line]
    assert steps == [(step, again) for again in (True, False, True) for step in ("quantized", "verified")]


def test_the_table_of_a_dry_run() -> None:
    from rich.console import Console

    from aoconvert.cli.release import table

    planned: dict[str, Any] = {"model": "m", "scheme": "int8wo", "status": "planned"}
    planned |= {"size_bytes": 5 * 10**9, "disk_bytes": 6 * 10**9}
    cpu = VariantRecord(name="cpu", seconds_guess=200.4, **planned)
    gpu = VariantRecord(name="gpu", **planned)  # of which nothing was measured
    console = Console(width=80)
    with console.capture() as shown:
        console.print(table(Record(name="x", models=(), ok=True, variants=(cpu, gpu))))
    head, first, second, *_ = shown.get().splitlines()
    assert head.split() == ["variant", "status", "size", "bits", "disk", "time", "(guess)"]
    assert first.split() == ["cpu", "planned", "5.00", "GB", "6.00", "GB", "3", "min"]
    assert second.split() == ["gpu", "planned", "5.00", "GB", "6.00", "GB"]
