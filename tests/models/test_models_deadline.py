"""Code that does not end is stopped, wherever it is in Python, and what comes after runs as before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from aoconvert.models.deadline import TookTooMuch, deadline


def loop() -> None:
    while True:
        pass


def stubborn() -> None:
    for _ in range(3):
        try:
            loop()
        except Exception:
            continue
    raise ValueError("another error")


@pytest.mark.parametrize("work", [loop, stubborn])
def test_what_does_not_end_is_stopped(work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aoconvert.models.deadline._AGAIN", 0.1)
    began = time.process_time()
    with pytest.raises(TookTooMuch), deadline(0.1):
        work()
    assert time.process_time() - began < 5


def test_in_a_thread_that_is_not_the_first() -> None:
    found: list[type[BaseException]] = []

    def work() -> None:
        try:
            with deadline(0.1):
                loop()
        except TookTooMuch as error:
            found.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert found == [TookTooMuch]


def test_what_ends_is_left_alone() -> None:
    threads = threading.active_count()
    for _ in range(20):
        with deadline(60.0):
            pass
    with pytest.raises(KeyError), deadline(60.0):
        raise KeyError("its own")
    assert threading.active_count() == threads


def test_no_memory_is_too_much_too() -> None:
    with pytest.raises(TookTooMuch), deadline(60.0):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
