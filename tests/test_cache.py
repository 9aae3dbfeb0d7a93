"""What is remembered between runs: only what was made from the same facts, only from a folder of this user's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def fill(place: Path | None, size: int) -> None:
    assert place is not None
    (place / "sub").mkdir(exist_ok=True)
    (place / "sub" / "file").write_bytes(bytes(size))


def kept(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir())


def test_the_least_recently_used_go_first(place: Path) -> None:
    for number, name in enumerate("abc"):
        with cache.hold("kind", name) as folder:
            fill(folder, 100)
        os.utime(place / name, ns=(number, number))
    with cache.hold("kind", "a") as folder:
        assert folder is not None and (folder / "sub" / "file").stat().st_size == 100
    cache.shrink("kind", 300)
    assert kept(place) == ["a", "b", "c"]
    cache.shrink("kind", 250)
    assert kept(place) == ["a", "c"]
    (place / ".0123").mkdir()  # of a run that was killed
    cache.shrink("kind", 100)
    assert kept(place) == ["a"]
    cache.shrink("kind", 0)
    assert kept(place) == []
    assert (place / "CACHEDIR.TAG").is_file()


def test_what_is_in_use_stays(place: Path) -> None:
    """Also what two hold, until the second lets go; what was removed is made again."""
    with cache.hold("kind", "a") as first:
        fill(first, 100)
        with cache.hold("kind", "a") as second, cache.hold("kind", "b") as other:
            assert first == second
            fill(other, 10)
            cache.shrink("kind", 0)
            assert kept(place) == ["a", "b"]
        cache.shrink("kind", 0)
        assert kept(place) == ["a"]
    cache.shrink("kind", 0)
    assert kept(place) == []
    with cache.hold("kind", "a") as again:
        assert again is not None and list(again.iterdir()) == []


def test_what_another_process_uses_stays(place: Path) -> None:
    code = "import sys; from aoconvert import cache\nwith cache.hold('kind', 'a'): print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        fill(place / "a", 100)
        cache.shrink("kind", 0)
        assert kept(place) == ["a"]
        child.kill()
    cache.shrink("kind", 0)
    assert kept(place) == []


_USES = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 60)), max_size=12)


@given(uses=_USES, limit=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_never_more_than_the_limit(uses: list[tuple[str, int]], limit: int) -> None:
    """What is left is what was used last, as much of it as the limit has room for, and what is in use."""
    with tempfile.TemporaryDirectory() as base, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AOCONVERT_CACHE_DIR", base)
        order: dict[str, int] = {}
        for number, (name, size) in enumerate(uses):
            with cache.hold("kind", name) as folder:
                fill(folder, size)
                cache.shrink("kind", limit)
                order.pop(name, None)
                order[name] = size
                wanted = list(order)
                while sum(order[name] for name in wanted) > limit and len(wanted) > 1:
                    wanted.pop(0)
                assert kept(Path(base) / "kind") == sorted(wanted)
                order = {name: order[name] for name in wanted}
            os.utime(Path(base) / "kind" / name, ns=(number, number))  # one after the other on any file system


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
