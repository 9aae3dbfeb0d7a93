"""What is remembered between runs: only what was made from the same facts, only from a folder of this user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aoconvert import cache
from aoconvert.models import build_skeleton, identify
from aoconvert.models.base import from_json, to_json
from aoconvert.sources import resolve


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kind"


def test_remembered_once(place: Path) -> None:
    calls: list[Any] = []

    def ask(facts: Any, value: Any) -> Any:
        return cache.remember("kind", facts, lambda: calls.append(facts) or value)

    assert ask({"a": 1}, [1, None, "x"]) == [1, None, "x"]
    assert ask({"a": 1}, "other") == [1, None, "x"]
    assert ask({"a": 2}, "other") == "other"
    assert ask({"a": 3}, None) is None
    assert ask({"a": 3}, 5) == 5  # nothing is kept of None
    assert calls == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 3}]
    assert place.stat().st_mode & 0o777 == 0o700
    assert len(list(place.glob("*.json"))) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_damaged(place: Path, content: bytes) -> None:
    assert cache.remember("kind", 1, lambda: "made") == "made"
    [file] = place.glob("*.json")
    file.write_bytes(content)
    assert cache.remember("kind", 1, lambda: "again") == "again"
    assert cache.remember("kind", 1, lambda: "third") == "again"


def test_off_and_not_trusted(place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cache.remember("kind", 1, lambda: "made")
    place.chmod(0o770)
    assert cache.remember("kind", 1, lambda: "again") == "again"
    assert "mode 0700" in caplog.text
    place.chmod(0o700)
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", "")
    assert cache.folder("kind") is None
    assert cache.remember("kind", 1, lambda: "again") == "again"
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", "/proc/nothing")
    assert cache.remember("kind", 1, lambda: "again") == "again"


@pytest.mark.parametrize("family", ["cogvideox", "flux", "pixart", "sd3", "wan"])
def test_a_remembered_model_is_the_built_one(family: str, checkpoints: Any, place: Path) -> None:
    import torch

    layout = identify(resolve(str(checkpoints(family))))
    for component in layout.components:
        if component.library != "diffusers":
            continue
        built = build_skeleton(component, torch.bfloat16)
        known = build_skeleton(component, torch.bfloat16)
        assert built.model is not None
        assert known.tensors == built.tensors == from_json(to_json(built.tensors))
        for file in (place.parent / "skeletons").iterdir():
            file.write_text('[{"name": 5}]')
        assert build_skeleton(component, torch.bfloat16).tensors == built.tensors
