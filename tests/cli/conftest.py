import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from helpers.checkpoints import llama, pipeline

__all__ = ["llama", "pipeline"]


@dataclass(frozen=True)
class Called:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Called]]:
    """Run the command line in this process; everything that is written to the two streams counts."""
    from aoconvert.cli.main import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Called:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        written = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Called(code, written.out, written.err)

    yield run
    signal.signal(signal.SIGTERM, before)
