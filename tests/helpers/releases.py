"""Tiny releases, and what two runs of one have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aoconvert.releasing import Record, release
from helpers.checkpoints import build_llama

TWO_SCHEMES = """
name = "Tiny"
source = "model"
[defaults]
device = "cpu"
min_quantized = 0
[[variants]]
scheme = "int8wo"
[[variants]]
scheme = "intx2wo"
[gates]
min_sqnr_db = 20
"""
_TIMES = ("run", "manifest_sha256", "seconds", "date")

Events = dict[str, list[dict[str, Any]]]


def write_release(folder: Path, text: str = TWO_SCHEMES) -> Path:
    """A release file with a Llama beside it."""
    build_llama(folder / "model")
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def make(file: Path, output: str, **options: Any) -> tuple[Record, Events]:
    """The record, and the events of each variant."""
    events: Events = {}
    options = {"skip_push": True, "output_root": file.parent / output, **options}
    record = release(file, on_event=lambda event: events.setdefault(event["variant"], []).append(event), **options)
    return record, events


def steps_of(events: Events) -> Events:
    """What does not depend on a clock."""
    return {
        name: [{k: v for k, v in event.items() if k != "seconds"} for event in mine if event["event"] != "progress"]
        for name, mine in events.items()
    }


def contents(root: Path) -> dict[str, Any]:
    """Every file below a folder, but for times and what depends on them, and for the folder's own path."""
    found: dict[str, Any] = {}
    for path in filter(Path.is_file, root.rglob("*")):
        name = str(path.relative_to(root))
        if path.name == "release.html":  # it has the command that was run
            continue
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text().replace(str(root), "")))
        elif path.name == "README.md":  # it ends with its own digest
            found[name] = path.read_text().replace(str(root), "").rpartition("<!-- written")[0]
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    """A document without times and without what depends on them."""
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in _TIMES}
    return value
