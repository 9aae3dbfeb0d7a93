"""A result that was changed, with everything that the manifest says of it made right again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import Manifest
from aoconvert.verification.children.load_child import describe

# in the manifest → as the child says it
_FACTS = {key: key for key in ("shape", "dtype", "data_names", "sha256")} | {"class_name": "class"}


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Load a .bin, change its dict in place, and write it again."""
    state = dict(torch.load(path, weights_only=True))
    change(state)
    torch.save(state, path)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda values: None) -> None:
    """Have the manifest describe what is in the folder now: files, hashes, tensors; stated figures stay."""
    values = json.loads((folder / "aoconvert.json").read_text(encoding="utf-8"))
    change(values)
    values["unquantized"] = [part for part in values["unquantized"] if (folder / part["path"]).exists()]
    parts = [*values["components"], *values["unquantized"]]
    for part in parts:
        state: dict[str, Any] = {}
        for entry in part["files"]:
            if entry["path"].endswith(".bin"):
                state |= torch.load(folder / entry["path"], weights_only=True)
        part["tensors"] = [t for t in part["tensors"] if t["name"] in state or t.get("action") == "tied"]
        for tensor in part["tensors"]:
            if (found := state.get(tensor["name"])) is not None:
                facts = describe(found)
                tensor |= {key: facts[said] for key, said in _FACTS.items() if key in tensor}
    own = [entry["path"] for part in parts for entry in part["files"]]
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    rest = [path for path in there if path not in {*own, "aoconvert.json", "aoconvert.verify.json"}]
    values["copied"] = [_entry(folder, path) for path in rest]
    for part in parts:
        part["files"] = [_entry(folder, entry["path"]) for entry in part["files"]]
    values["run"]["digest"] = None
    (folder / "aoconvert.json").write_text(manifests.dump(Manifest.model_validate(values)), encoding="utf-8")


def _entry(folder: Path, path: str) -> dict[str, Any]:
    place = folder / path
    return {"path": path, "size": place.stat().st_size, "sha256": file_sha256(place)}
