"""An adapter beside a model's weights: its config and the one weights file that the library takes, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from aoconvert.sources.adapters import adapter_files
from aoconvert.sources.folder import FolderSource

_BOTH = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (_BOTH, _BOTH),
        (("adapter_config.json", "adapter_model.bin"), ("adapter_config.json", "adapter_model.bin")),
        ((*_BOTH, "adapter_model.bin"), _BOTH),
        (("adapter_config.json",), ()),
        (("adapter_model.safetensors",), ()),
        ((), ()),
    ],
)
@pytest.mark.parametrize("folder", ["", "text_encoder"])
def test_config_and_weights_or_neither(
    tmp_path: Path, there: tuple[str, ...], found: tuple[str, ...], folder: str
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for name in there:
        (tmp_path / folder / name).write_bytes(b"{}")
    at = f"{folder}/" if folder else ""
    assert adapter_files(FolderSource(tmp_path), folder) == tuple(at + name for name in found)
