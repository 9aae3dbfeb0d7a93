"""Advice to the kernel is advice: where it is refused, reading and hashing go on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import aoconvert
from aoconvert.formats.hashing import advise, forget, hash_on


def test_advice_that_the_kernel_refuses() -> None:
    """A pipe takes none, and neither does a descriptor that is closed."""
    ends = os.pipe()
    with pytest.raises(OSError):
        os.posix_fadvise(ends[0], 0, 0, os.POSIX_FADV_SEQUENTIAL)
    for _ in range(2):
        advise(ends[0], 0, 0, "SEQUENTIAL")
        forget(ends[0], 0, 1 << 20)
        for end in ends:
            os.close(end)
        ends = os.pipe()
    for end in ends:
        os.close(end)
    advise(ends[0], 0, 0, "DONTNEED")


@pytest.mark.parametrize("fails", ["with an error of the disk", "as it is not there"])
def test_a_system_that_takes_no_advice(
    fails: str, checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run, where every advice fails."""
    asked: list[int] = []

    def refuse(descriptor: int, start: int, size: int, advice: int) -> None:
        asked.append(descriptor)
        raise OSError(5, "Input/output error")

    if fails == "as it is not there":
        monkeypatch.delattr(os, "posix_fadvise")
    else:
        monkeypatch.setattr(os, "posix_fadvise", refuse)
    save_file({"w": torch.ones(8)}, tmp_path / "file")
    with (tmp_path / "file").open("rb") as file:
        digest = hashlib.sha256()
        assert hash_on(file.fileno(), digest, 0, 1 << 20) == (tmp_path / "file").stat().st_size
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    result = aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=tmp_path / "out", device="cpu")
    assert result.output.is_dir()
    assert bool(asked) == (fails != "as it is not there")
