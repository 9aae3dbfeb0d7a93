"""Manifests of converted checkpoints, changed as their writer could have written them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aoconvert.checkpoint import manifest as manifests

REPO = "someone/tiny-int8wo"


def edit(folder: Path, change: Any) -> None:
    """Change a manifest as its writer could have written it: with a right digest."""
    values = json.loads((folder / "aoconvert.json").read_text())
    change(values)
    text = manifests.dump(manifests.Manifest.model_validate(values))
    (folder / "aoconvert.json").write_text(text)
