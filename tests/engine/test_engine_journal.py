"""The journal's lines: written, torn, edited and made up; nothing in it is believed without a proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stopping import StopAfter, convert

from aoconvert.checkpoint.unfinished import JOURNAL_NAME
from aoconvert.engine.resume import Journal
from aoconvert.engine.resume_file import FileLine, JournalFile, TensorLine, differences, read_journal, signature_of
from aoconvert.engine.staging import Stage
from aoconvert.errors import Interrupted, WriteError
from aoconvert.options import QuantizeOptions
from aoconvert.planning import Plan
from aoconvert.planning.build import build_plan
from aoconvert.progress import Silent
from aoconvert.sources import resolve

LINES = [FileLine(file=f"{number}.bin", size=number, sha256="0" * 64) for number in range(5)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    file = JournalFile(path, {"a": 1}, LINES[:2])
    for line in LINES[2:]:
        file.append(line)
    file.close()
    assert read_journal(path) == ({"a": 1}, LINES)
    assert [json.loads(line)["chain"] for line in path.read_text().splitlines()]
    assert list(tmp_path.iterdir()) == [path]


def test_no_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "journal") is None
    (tmp_path / "journal").mkdir()
    assert read_journal(tmp_path / "journal") is None
    for content in (b"", b"\n", b"\0" * 4096, b"{}\n", b"[" * 100_000 + b"\n", b'{"format": 2, "chain": ""}\n'):
        (tmp_path / "other").write_bytes(content)
        assert read_journal(tmp_path / "other") is None
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert read_journal(tmp_path / "link") is None


@settings(max_examples=150, deadline=None)
@given(
    cut=st.none() | st.integers(0, 3000),
    at=st.integers(0, 3000),
    new=st.binary(max_size=4),
    tail=st.sampled_from([b"", b"\n", b"\0" * 512, b"{}\n"]),
)
def test_a_torn_or_edited_line_is_the_end(
    tmp_path_factory: pytest.TempPathFactory, cut: int | None, at: int, new: bytes, tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("torn") / "journal"
    JournalFile(path, {"a": 1}, LINES).close()
    content = path.read_bytes()
    changed = (content[:at] + new + content[at + len(new) :])[:cut] + tail
    path.write_bytes(changed)
    found = read_journal(path)
    # the lines before the first byte that differs
    same = next((i for i, (a, b) in enumerate(zip(content, changed, strict=False)) if a != b), len(changed))
    whole = content[:same].count(b"\n")
    assert found == (({"a": 1}, LINES[: whole - 1]) if whole else None)


def test_lines_that_were_swapped_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    JournalFile(path, {"a": 1}, LINES).close()
    lines = path.read_bytes().splitlines(keepends=True)
    for other, count in (([0, 1, 3, 4], 1), ([0, 2, 1, 3], 0), ([0, 1, 1, 2], 1)):
        path.write_bytes(b"".join(lines[number] for number in other))
        assert read_journal(path) == ({"a": 1}, LINES[:count])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk(tmp_path: Path) -> None:
    import os

    file = JournalFile(tmp_path / "journal", {"a": 1}, LINES)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file._descriptor)
    os.close(full)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        file.append(LINES[0])
    assert caught.value.hint and "free space" in caught.value.hint
    file.close()
    assert read_journal(tmp_path / "journal") == ({"a": 1}, LINES)


def test_what_changed_is_named() -> None:
    now = {"versions": {"torch": "2.13.0+cpu", "torchao": "0.19.0"}, "device": "cpu", "plan": "p", "source": "s"}
    assert differences(now, now) == []
    was = {**now, "versions": {"torch": "2.13.0+cpu", "torchao": "0.18.0"}}
    assert differences(was, now) == ["torchao 0.18.0 → 0.19.0"]
    was = {**now, "device": "cuda NVIDIA H100", "plan": "q", "source": None}
    assert differences(was, now) == ["the device changed", "the plan changed", "the source changed"]
    assert differences({}, now)[0] == "torch none → 2.13.0+cpu"
    assert differences({**now, "versions": [1]}, now) == ["torch none → 2.13.0+cpu", "torchao none → 0.19.0"]
    assert differences({**now, "more": 1}, now) == ["its journal has another format"]


@pytest.fixture(scope="module")
def stopped(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, Any]:
    """A plan, the unfinished folder of a run of it that was stopped, and the journal there."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "source").symlink_to(checkpoints("llama-tied"))
    with pytest.raises(Interrupted):
        convert(folder / "source", folder / "out", StopAfter(6))
    plan = build_plan(
        resolve(str(folder / "source")),
        QuantizeOptions("int8wo", output=folder / "again" / "out", device="cpu", min_quantized=0.0),
        need_weights=True,
    )
    return plan, folder / ".out.aoconvert-partial", read_journal(folder / ".out.aoconvert-partial" / JOURNAL_NAME)


def reopened(plan: Plan, partial: Path, signature: Any, lines: list[Any]) -> tuple[Journal, int, str | None]:
    """A journal with these lines beside what the run left, how many tensors are kept, and why not more."""
    stage = Stage(plan.output)
    shutil.copytree(partial, stage.root, dirs_exist_ok=True)
    JournalFile(stage.root / JOURNAL_NAME, signature, lines).close()
    journal = Journal(plan, stage)
    try:
        reason = journal.open(True, Silent())
        return journal, stage.kept, reason
    finally:
        journal.close()
        stage.discard()


def test_the_signature_is_the_same_twice(stopped: tuple[Plan, Path, Any]) -> None:
    plan, _, (signature, _) = stopped
    assert differences(signature, signature_of(plan)) == []
    assert json.loads(json.dumps(signature)) == signature
    assert str(plan.source.root) not in json.dumps(signature)


def test_every_line_counts_when_nothing_changed(stopped: tuple[Plan, Path, Any]) -> None:
    plan, partial, (signature, lines) = stopped
    journal, kept, reason = reopened(plan, partial, signature, lines)
    assert (kept, reason) == (6, None)
    assert list(journal.finished(plan.components[0])) == list(plan.components[0].order[:6])


hostile = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2**63,
        2**200,
        1.5,
        float("inf"),
        "",
        "x",
        "../../etc/passwd",
        "/etc/passwd",
        "0" * 64,
        [],
        {},
        ["call", ["global", "os", "system"], ["tuple", "true"], False, [], None],
        ["storage", ["global", "a", "b"], "0", 1],
    ]
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(value, key) for key, _ in items] + [place for _, item in items_of(value) for place in places(item)]


def items_of(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_made_up_lines_are_refused_without_a_traceback(stopped: tuple[Plan, Path, Any], data: st.DataObject) -> None:
    """Their chain is right: somebody means it. No name that a pickle may not hold, and no path outside."""
    plan, partial, (signature, lines) = stopped
    number = data.draw(st.integers(0, len(lines) - 1))
    values = json.loads(json.dumps(lines[number].model_dump()))
    container, key = data.draw(st.sampled_from(places(values)))
    container[key] = data.draw(hostile)
    made_up = TensorLine.model_construct(**values)
    signed = [*lines[:number], made_up, *lines[number + 1 :]]
    journal, _, _ = reopened(plan, partial, signature, signed)
    done = journal.finished(plan.components[0])
    assert list(done) in [list(plan.components[0].order[:count]) for count in range(7)]
    good = {name for line in lines for name in names_of(line.resume_state)}
    for result in done.values():
        assert result.written.globals <= good
        assert isinstance(result.written.class_name, str)


def names_of(node: Any) -> set[str]:
    found = {".".join(node[1:3])} if isinstance(node, list) and node[:1] == ["global"] else set()
    return found.union(*map(names_of, node)) if isinstance(node, list) else found
