"""The record of a release for people: in a terminal of any width, and in a CI job's summary."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from aoconvert.checkpoint.evaluation import GateResult
from aoconvert.cli.release import markdown, table
from aoconvert.errors import HubError
from aoconvert.releasing.record import Record, VariantRecord, failure_of

URL = "https://huggingface.co/my-org/CogVideoX-5b-int8wo"
MISSED = GateResult(name="max-size", limit=2e9, value=3e9, passed=False)
FAILED = failure_of(HubError("no <b>|`entry`", hint="log in"))
RECORD = Record(
    name="Cog*VideoX",
    models=(),
    ok=False,
    variants=(
        VariantRecord(name="int8wo", model="m", scheme="int8wo", status="pushed", url=URL, size_bytes=11 * 10**9),
        VariantRecord(name="intx2wo", model="m", scheme="intx2wo", status="gate_failed", gates=(MISSED,)),
        VariantRecord(name="float8wo", model="m", scheme="float8wo", status="failed", error=FAILED),
    ),
)
SAID = [URL, "max-size 3.00 GB (limit 2.00 GB)", "no <b>|`entry` (log in)"]


def shown(width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(table(RECORD))
    return file.getvalue().splitlines()


def test_wide() -> None:
    lines = shown(140)
    assert [line.split()[0] for line in lines] == ["variant", "int8wo", "intx2wo", "float8wo", "Cog*VideoX:"]
    assert all(said in line for said, line in zip(SAID, lines[1:], strict=False))


@pytest.mark.parametrize("width", [119, 80, 60, 40])
def test_narrow(width: int) -> None:
    lines = shown(width)
    assert all(len(line) <= width for line in lines)
    assert [line.split()[1] for line in lines[1:4]] == ["pushed", "gate_failed", "failed"]
    text = "".join(line.replace(" ", "") for line in lines)
    assert all(said.replace(" ", "") in text for said in SAID)


def test_markdown() -> None:
    title, _, *rows, _ = markdown(RECORD).splitlines()
    assert title == r"### Cog\*VideoX"
    assert rows[2:] == [
        f"| `int8wo` | pushed | 11.00 GB |  |  | {URL} |",
        r"| `intx2wo` | gate_failed |  |  |  | max-size 3.00 GB (limit 2.00 GB) |",
        r"| `float8wo` | failed |  |  |  | no \<b\>\|\`entry\` (log in) |",
    ]
