"""Parts of a release as a job: machines, documents in a log, what is kept in a bucket, options."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from aoconvert.cli.release import command
from aoconvert.errors import PlanError, UsageError, WriteError
from aoconvert.options.jobs import parse_duration
from aoconvert.releasing.engines.hf_jobs.checks import check_client
from aoconvert.releasing.engines.hf_jobs.flavors import MachineNeeds, choose_flavor, read_prices
from aoconvert.releasing.engines.hf_jobs.keep import Keeper
from aoconvert.releasing.engines.hf_jobs.lines import MOST, DocumentReader, to_lines

GB = 10**9


def test_the_table_has_the_machines_that_the_client_knows() -> None:
    from huggingface_hub import JobHardware

    prices = read_prices()
    names = {flavor.name for flavor in prices.flavors}
    assert {hardware.value for hardware in JobHardware} <= names
    assert prices.origin == "file" and re.fullmatch(r"\d{4}-\d\d-\d\d", str(prices.read))
    for flavor in prices.flavors:
        assert flavor.micro_usd > 0 and flavor.memory_bytes and flavor.disk_bytes
        assert (flavor.gpu is None) == (flavor.gpus == 0) == (flavor.gpu_bytes == 0)


@pytest.mark.parametrize(
    ("needs", "hours", "chosen"),
    [
        (MachineNeeds(10 * GB, 40 * GB, 0, 0), {}, "cpu-basic"),
        # a machine with more cores needs less time, and costs less in all
        (MachineNeeds(10 * GB, 40 * GB, 0, 0), {"cpu-basic": 40, "cpu-upgrade": 10}, "cpu-upgrade"),
        (MachineNeeds(40 * GB, 40 * GB, 0, 0), {}, "cpu-xl"),
        (MachineNeeds(10 * GB, 200 * GB, 0, 0), {}, "l4x1"),
        (MachineNeeds(10 * GB, 40 * GB, 1, 20 * GB), {}, "l4x1"),
        (MachineNeeds(10 * GB, 40 * GB, 1, 70 * GB), {}, "a100-large"),
        (MachineNeeds(10 * GB, 40 * GB, 2, 70 * GB), {}, "rtx-pro-6000x2"),
    ],
)
def test_the_cheapest_that_is_large_enough(needs: MachineNeeds, hours: dict[str, int], chosen: str) -> None:
    flavors = read_prices().flavors
    seconds = {flavor.name: 3600 * hours.get(flavor.name, 1) for flavor in flavors}
    assert choose_flavor(flavors, needs, seconds).name == chosen
    with pytest.raises(PlanError, match=r"no machine of Hugging Face Jobs has 9.00 TB of memory"):
        choose_flavor(flavors, MachineNeeds(9000 * GB, 0, 0, 0), seconds)


def test_a_minute_that_is_begun_is_paid() -> None:
    flavor = read_prices().find("cpu-xl")
    assert [round(flavor.cost(seconds, 2), 4) for seconds in (60, 61, 3600)] == [0.0333, 0.0667, 2.0]


@given(st.dictionaries(st.text(), st.text(max_size=9000), max_size=3), st.text(max_size=50))
def test_documents_arrive_whole(values: dict[str, str], between: str) -> None:
    document = {"event": "x", "values": values}
    reader = DocumentReader()
    found = []
    for line in to_lines(document):
        assert len(line) <= MOST and "\n" not in line
        taken = [reader.take(f"a line {between}"), reader.take(line)]
        found += [each for each in taken if each]
    assert found == [document]


@pytest.mark.parametrize(
    "line", ['{"event": ', '{"event": 1} x', '{"error":"x', '{"event": "part", "number": 4, "of": 5, "text": "x"}']
)
def test_what_is_no_document_is_a_line_of_the_log(line: str) -> None:
    assert DocumentReader().take(line) is None


def test_a_part_that_is_lost_loses_its_document_alone() -> None:
    reader = DocumentReader()
    long, short = {"event": "x", "text": "a" * 20_000}, {"event": "y"}
    lines = [*list(to_lines(long))[1:], *to_lines(short), *to_lines(long)]
    assert [found for found in map(reader.take, lines) if found] == [short, long]


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_variant_is_kept_when_it_is_whole(tmp_path: Path) -> None:
    work, bucket = tmp_path / "work", tmp_path / "bucket"
    write(work / "a", weights="1", old="1")
    write(work / "b", weights="half")
    write(work, **{"a.made.json": "note", "release.json": "{}"})
    keeper = Keeper(work, bucket, ["a", "b"])
    assert keeper.restore() == []
    keeper.keep()
    assert sorted(path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file()) == [
        *("a.made.json", "a/old", "a/weights", "release.json")
    ]
    # made anew: while it is copied there is no note, so what is half there is not taken for whole
    (work / "a" / "old").unlink()
    write(work / "a", weights="22")
    write(work, **{"a.made.json": "another note"})
    (bucket / "a" / "new").mkdir()
    write(work / "a", new="2")
    with pytest.raises(WriteError):
        keeper.keep()
    assert not (bucket / "a.made.json").exists()
    (bucket / "a" / "new").rmdir()
    keeper.keep()
    other = tmp_path / "other"
    assert Keeper(other, bucket, ["a", "b"]).restore() == ["a"]
    assert {path.name: path.read_text() for path in (other / "a").iterdir()} == {"weights": "22", "new": "2"}
    assert (other / "a.made.json").read_text() == "another note" and not (other / "b").exists()


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    write(tmp_path / "bucket" / "a", weights="1")
    write(tmp_path / "bucket", **{"a.made.json": "note"})
    keeper = Keeper(tmp_path / "work", tmp_path / "bucket", ["a"])
    keeper.restore()
    before = (tmp_path / "bucket/a/weights").stat().st_mtime_ns
    write(tmp_path / "work" / "a", report="new")
    keeper.keep()
    assert (tmp_path / "bucket/a/weights").stat().st_mtime_ns == before
    assert (tmp_path / "bucket/a/report").read_text() == "new"
    # a report that cannot be added does not cost the variant
    (tmp_path / "bucket/a/other").mkdir()
    write(tmp_path / "work" / "a", other="new")
    with pytest.raises(WriteError):
        keeper.keep()
    assert (tmp_path / "bucket/a.made.json").exists()


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90m", 5400), ("1.5h", 5400), ("1d", 86400), ("2 h", 7200)])
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds
    for wrong in ("", "h", "-1h", "0", "0.1s", "1w", "1h30m", "1e9"):
        with pytest.raises(UsageError, match="is not a duration"):
            parse_duration(wrong)


def test_a_client_that_is_too_old() -> None:
    check_client(version("huggingface_hub"))
    for old in ("2.3.9", "1.29.0", None):
        with pytest.raises(UsageError, match=r"needs huggingface_hub 2.4 or newer"):
            check_client(old)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--flavor", "cpu-xl"], "--flavor is for a job"),
        (["--confirm"], "--confirm is for a job"),
        (
            ["--engine", "hf-jobs", "--output-root", "releases"],
            "--output-root: the job keeps what it makes in --bucket",
        ),
        (["--engine", "hf-jobs", "--timeout", "soon"], "'soon' is not a duration"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: list[str], said: str) -> None:
    (tmp_path / "r.toml").write_text("")
    ran = CliRunner().invoke(command, [str(tmp_path / "r.toml"), *options])
    assert isinstance(ran.exception, UsageError) and said in ran.exception.message


def test_the_machines_are_a_file_of_the_package() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    patterns: Any = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert any((root / "aoconvert").glob(pattern) for pattern in patterns["aoconvert"] if "hf_jobs" in pattern)
    assert json.loads((root / "aoconvert/releasing/engines/hf_jobs/flavors.json").read_text())["flavors"]
