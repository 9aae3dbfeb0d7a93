from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from fake_hub.fixtures import hub_client
from helpers.forking import Forker, start_forked
from helpers.shared import build_once
from hypothesis import settings

__all__ = ["hub_client"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("AOCONVERT_CACHE_DIR", "")  # nothing of this user's is used or left
os.environ.setdefault("AOCONVERT_COMPILE", "0")  # what tests of the kernels alone need, they compile
# tests run side by side: threads that spin while they wait take the cores from each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# no test has a clock: a busy machine is no failure
settings.register_profile("aoconvert", deadline=None)
settings.load_profile("aoconvert")
# a shell starts background jobs with SIGINT ignored, and whatever they start inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules and tests stay to the end: while they come, and ever after, nobody looks for garbage among them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)  # models are built all the time, and few of their objects refer to each other
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rest of a table may take long; what runs by default may not."""
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny source checkpoints by family name. Do not write to them."""
    import torch
    from helpers import tiny

    def build(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny.FAMILIES[folder.name].build(folder)

    return lambda name: build_once(tmp_path_factory, f"source/{name}", build)


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Forker:
    """Starts processes that have their imports already."""
    return Forker.of_run(tmp_path_factory)


@pytest.fixture(autouse=True)
def children_of_verify(request: pytest.FixtureRequest, forker: Forker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``verify`` starts is forked, and imports nothing again; ``fresh`` tests start real interpreters."""
    if request.node.get_closest_marker("fresh") is None:
        from aoconvert.verification import process

        monkeypatch.setattr(process, "start_interpreter", partial(start_forked, forker))
