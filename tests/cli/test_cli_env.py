"""``aoconvert env`` and ``aoconvert cache``."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from aoconvert import cache

Call = Callable[..., Any]


def test_env(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 34)
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(tmp_path))
    done = call("env", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["mslk"] is None
    assert found["devices"][0]["device"] == "cpu"
    assert found["device"] in {device["device"].partition(":")[0] for device in found["devices"]}
    assert found["caches"]["aoconvert"] == str(tmp_path)
    assert found["hub"]["token"] is True
    assert "hf_ss" not in done.stdout
    shown = call("env").stdout
    for part in (f"torchao {version('torchao')}", "--device auto", "with a token", str(tmp_path)):
        assert part in " ".join(shown.split())
    assert call("env", "-q").stdout == f"{found['device']}\n"


def test_cache(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(tmp_path))
    cache.remember("configs", 1, lambda: "made")
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    found = json.loads(call("cache", "--json").stdout)
    kinds = [{"name": "configs", "files": 1, "bytes": len('"made"'), "limit": None}]
    assert found == {"path": str(tmp_path), "bytes": 6, "kinds": kinds, "cleared": False}
    assert call("cache", "-q").stdout == f"{tmp_path}\n"
    assert json.loads(call("cache", "--clear", "--json").stdout)["cleared"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine"]
    assert (tmp_path / "mine" / "letter").read_text() == "dear"
    assert cache.remember("configs", 1, lambda: "made again") == "made again"


def test_the_limit_is_shown(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(tmp_path))
    with cache.hold("eval", "reference") as folder:
        assert folder is not None
        (folder / "file").write_bytes(bytes(5))
    [kind] = json.loads(call("cache", "--json").stdout)["kinds"]
    assert kind == {"name": "eval", "files": 1, "bytes": 5, "limit": 20 * 10**9}
    monkeypatch.setenv("AOCONVERT_CACHE_LIMIT", "3GB")
    assert "1 file, 5 B (at most 3.00 GB)" in call("cache").stdout
    monkeypatch.setenv("AOCONVERT_CACHE_LIMIT", "3 cats")
    failed = call("cache")
    assert failed.code == 2 and "AOCONVERT_CACHE_LIMIT: '3 cats' is not a size" in failed.stderr


def test_no_cache(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", "")
    assert json.loads(call("cache", "--clear", "--json").stdout) == {
        "path": None,
        "bytes": 0,
        "kinds": [],
        "cleared": True,
    }
