"""What a run reads of its source's headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aoconvert
from aoconvert.formats.safetensors import header


@pytest.mark.parametrize("kind", ["llama-tied", "cogvideox"])
def test_each_header_is_parsed_once(
    kind: str, checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: Counter[str] = Counter()
    parse = header._parse

    def counted(raw: bytes, file_size: int, sha256: str, label: str) -> Any:
        parsed[label] += 1
        return parse(raw, file_size, sha256, label)

    monkeypatch.setattr(header, "_parse", counted)
    source = checkpoints(kind)
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    assert set(parsed) == {str(path) for path in source.rglob("*.safetensors")}
    assert set(parsed.values()) == {1}
