"""Interpreters that never end, take all memory, or leave others behind: each is ended, and what it had said counts."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aoconvert.errors import UsageError, VerificationError
from aoconvert.verification.limits import Limits, reserve
from aoconvert.verification.process import Children, Ended

pytestmark = pytest.mark.fresh  # the programs are made up here

FIRST = "import json, os, subprocess, sys, time\nprint(json.dumps({'opened': 1}), flush=True)\n"
ENDLESS = {
    "a loop": "while True: pass",
    "sleep": "time.sleep(1e6)",
    "signals are ignored": "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    "half an answer": "print('{\"opened\": ', end='', flush=True)\ntime.sleep(1e6)",
}


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Ask a program of one's own."""

    def run(body: str, limits: Limits) -> list[dict[str, Any]]:
        (tmp_path / "program.py").write_text(FIRST + body)
        with Children(limits, tmp_path) as children:
            return children.ask("program", {})

    return run


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends_is_ended(kind: str, ask: Callable[..., Any]) -> None:
    for seconds in (0.5, 4, 32, 256):  # on a busy machine it takes more to come to its first line
        with pytest.raises(Ended, match=rf"more than {seconds} s; AOCONVERT_VERIFY_SECONDS sets the limit") as found:
            ask(ENDLESS[kind], Limits(seconds=seconds))
        assert found.value.of == "time"
        if found.value.answers:
            break
    assert found.value.answers == [{"opened": 1}]


@pytest.mark.parametrize("step", [1 << 20, 64 << 20])
def test_what_takes_memory_without_end_is_ended(step: int, ask: Callable[..., Any]) -> None:
    with pytest.raises(Ended, match=r"AOCONVERT_VERIFY_MEMORY allows 200\.00 MB") as found:
        ask(f"kept = []\nwhile True: kept.append(b'x' * {step}); time.sleep(0.01)", Limits(memory=200_000_000))
    assert (found.value.of, found.value.answers) == ("memory", [{"opened": 1}])


def test_files_that_are_mapped_are_no_memory(ask: Callable[..., Any], tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.write(b"x" * (100 << 20))
    body = f"import mmap\nwith open({str(tmp_path / 'large')!r}, 'rb') as f: m = mmap.mmap(f.fileno(), 0, prot=1)\n"
    assert ask(f"{body}sum(m[::4096])\ntime.sleep(0.3)", Limits(memory=60 << 20)) == [{"opened": 1}]


def test_what_it_leaves_behind_is_ended_too(ask: Callable[..., Any], tmp_path: Path) -> None:
    """A process that holds its streams open; pipes would be waited for."""
    body = "later = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1e6)'])\n"
    assert ask(f"{body}open({str(tmp_path / 'pid')!r}, 'w').write(str(later.pid))", Limits()) == [{"opened": 1}]
    with contextlib.suppress(ProcessLookupError):  # somebody has waited for it
        ended = os.pidfd_open(int((tmp_path / "pid").read_text()))
        assert select.select([ended], [], [], 60)[0]
        os.close(ended)


def test_lines_that_are_not_answers_are_passed_by(ask: Callable[..., Any]) -> None:
    body = "print('{not json')\nprint('[1]')\nprint('{\"a\": 1')\nsys.stdout.buffer.write(b'\\xff{\\n')"
    assert ask(body, Limits()) == [{"opened": 1}]


def test_one_that_died_is_not_one_that_was_ended(ask: Callable[..., Any]) -> None:
    with pytest.raises(VerificationError, match=r"died \(exit code 3\): no memory for it$") as found:
        ask("sys.stderr.write('well\\nno memory for it\\n'); sys.exit(3)", Limits())
    assert not isinstance(found.value, Ended)


def test_limits_grow_with_the_model() -> None:
    small, large = (Limits().seconds_for(nbytes, 0) for nbytes in (1_000_000, 100_000_000_000))
    assert small > 600
    assert large > 60 * 60
    assert Limits().seconds_for(100_000_000_000, 100_000_000_000) > large
    assert Limits(seconds=7.0).seconds_for(100_000_000_000, 0) == 7.0
    assert 0 < reserve(1 << 20) < 1 << 20 < reserve(1 << 40)


def test_the_environment_says_other_limits() -> None:
    assert Limits.read({"AOCONVERT_VERIFY_SECONDS": "90", "AOCONVERT_VERIFY_MEMORY": "8GB"}) == Limits(90.0, 8 * 10**9)
    assert Limits.read({"AOCONVERT_VERIFY_SECONDS": ""}) == Limits()
    for name in ("SECONDS", "MEMORY"):
        for value in ("soon", "-1", "0", "nan", "inf", "1e999"):
            if (name, value) != ("MEMORY", "0"):
                with pytest.raises(UsageError, match=f"AOCONVERT_VERIFY_{name}"):
                    Limits.read({f"AOCONVERT_VERIFY_{name}": value})
