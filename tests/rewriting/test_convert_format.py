"""The other format of weights files: there and back, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import build_llama, pipeline
from safetensors.torch import load_file

import aoconvert
from aoconvert.errors import PlanError, SourceError, UsageError

__all__ = ["pipeline"]

SHAPE = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 64}
OPTIONS: dict[str, Any] = {"min_quantized": 0.0, "device": "cpu"}


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; of the manifest all that does not differ from run to run."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    manifest = json.loads(found["aoconvert.json"])
    del manifest["run"]
    return {**found, "aoconvert.json": manifest}


def there_and_back(made: Path, folder: Path) -> Path:
    """Both ways; what ``quantize --format safetensors`` gives is between."""
    there = aoconvert.convert(made, "safetensors", output=folder / "there")
    back = aoconvert.convert(there.output, "bin", output=folder / "back")
    assert contents(back.output) == contents(made)
    return there.output


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int4dq", {"max_shard_size": "150KB"}),
        *(
            pytest.param(scheme, options, marks=pytest.mark.exhaustive)
            for scheme, options in (
                ("int8wo", {}),
                ("int8dq", {}),
                ("int8wo", {"group_size": 32}),
                ("float8wo", {"max_shard_size": "150KB"}),
                ("float8dq", {}),
                ("mxfp8", {}),
                ("nvfp4", {}),
                ("int4wo", {"group_size": 64, "layout_device": "cuda"}),
                ("int4wo", {"group_size": 64, "layout_device": "xpu"}),
            )
        ),
    ],
)
def test_there_and_back_is_the_same_and_between_is_what_quantize_writes(
    tmp_path: Path, scheme: str, options: dict[str, Any]
) -> None:
    source = build_llama(tmp_path / "model", **SHAPE)
    for format_ in ("bin", "safetensors"):
        aoconvert.quantize(source, scheme, output=tmp_path / format_, format=format_, **OPTIONS, **options)
    there = there_and_back(tmp_path / "bin", tmp_path)
    assert contents(there) == contents(tmp_path / "safetensors")


def test_a_pipeline_with_a_name_without_a_dot_and_second_names(tmp_path: Path, pipeline: Path) -> None:
    source = Path(shutil.copytree(pipeline, tmp_path / "source"))
    weights = source / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    tensors |= {"encoder.embed_tokens.weight": tensors["shared.weight"], "dotless": torch.ones(3)}
    torch.save(tensors, source / "text_encoder/pytorch_model.bin")
    weights.unlink()
    made = aoconvert.quantize(source, "int8wo", output=tmp_path / "bin", **OPTIONS)
    there = there_and_back(made.output, tmp_path)
    assert not list(there.rglob("*.bin"))
    assert load_file(there / "text_encoder/model.safetensors").keys() == tensors.keys()


def test_what_cannot_be_converted_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", **SHAPE)
    options = {**OPTIONS, "group_size": 32, "layout_device": "cpu"}
    aoconvert.quantize(source, "int4wo", output=tmp_path / "bin", **options)
    with pytest.raises(PlanError, match="Int4OpaqueTensor") as caught:
        aoconvert.convert(tmp_path / "bin", "safetensors")
    assert len(caught.value.problems) == 1
    with pytest.raises(PlanError, match="is in bin files already"):
        aoconvert.convert(tmp_path / "bin", "bin")
    with pytest.raises(UsageError, match="format 'gguf'"):
        aoconvert.convert(tmp_path / "bin", "gguf")
    with pytest.raises(SourceError, match=r"aoconvert\.json"):
        aoconvert.convert(source, "bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "model"]


def test_a_file_that_was_changed_is_not_converted(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", **SHAPE)
    aoconvert.quantize(source, "int8wo", output=tmp_path / "made", format="safetensors", **OPTIONS)
    weights = tmp_path / "made/model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(SourceError, match="is not what the manifest lists"):
        aoconvert.convert(tmp_path / "made", "bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "model"]
