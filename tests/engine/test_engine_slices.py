"""A conversion in small pieces gives the bytes of a conversion tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aoconvert
from aoconvert.planning import slices

CASES = [
    ("cogvideox", "int8wo", {}),
    ("llama-tied", "float8wo", {}),
    ("sd3", "int4dq", {"dtype": "float32"}),
    ("bert", "intx3wo", {"dtype": "auto"}),
    ("opt", "int8wo", {"settings": {"granularity": "tensor"}}),
    ("qwen2-moe", "int8dq", {}),
    pytest.param("bert", "mxfp8", {}, marks=pytest.mark.exhaustive),
    ("bert", "nvfp4wo", {}),
    ("bert", "int4wo", {"layout_device": "cuda"}),
    pytest.param("bert", "int4wo", {"layout_device": "cpu"}, marks=pytest.mark.exhaustive),
]
# bytes of a piece, where the largest weights of a family would make thousands of the default's
SLICES = {"bert": 1 << 18, "cogvideox": 1 << 14}


@pytest.mark.parametrize(("family", "scheme", "more"), CASES)
def test_pieces_do_not_change_a_byte(
    family: str,
    scheme: str,
    more: dict[str, Any],
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def convert(name: str) -> dict[str, str]:
        output = tmp_path / name
        aoconvert.quantize(
            checkpoints(family), scheme, output=output, device="cpu", min_quantized=0, component_only=True, **more
        )
        digests = {
            path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in output.rglob("*")
            if path.is_file() and path.name != "aoconvert.json"
        }
        manifest = json.loads((output / "aoconvert.json").read_text())
        manifest.pop("run")
        return {**digests, "manifest": json.dumps(manifest)}

    whole = convert("whole")
    slice_bytes = SLICES.get(family, 2048)
    monkeypatch.setattr(slices, "SLICE_BYTES", slice_bytes)
    assert convert("put together") == whole
    monkeypatch.setattr(slices, "WHOLE_BYTES", slice_bytes // 2)
    assert convert("streamed") == whole


@pytest.mark.parametrize("legacy", [False, True])
def test_digest_of_a_source_whose_tensors_are_strided(legacy: bool, tmp_path: Path) -> None:
    """What is read of a transposed tensor is not what lies in the file; the file's SHA-256 must not care."""
    from helpers import tiny

    source = tmp_path / "source"
    model = tiny.sd3_transformer().bfloat16()
    model.save_pretrained(source)
    (source / "diffusion_pytorch_model.safetensors").unlink()
    state = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in model.state_dict().items()
    }
    weights = source / "diffusion_pytorch_model.bin"
    torch.save(state, weights, _use_new_zipfile_serialization=not legacy)
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    assert result.manifest.source.files[0].sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
