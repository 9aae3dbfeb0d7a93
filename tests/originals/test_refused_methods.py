"""Methods of quantization that are not read: refused by name, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import build_llama

import aoconvert
from aoconvert.errors import SourceError

_READ = "of quantized ones bitsandbytes, compressed-tensors, fp8, gguf, modelopt, mxfp4 are read"


@pytest.mark.parametrize(
    ("config", "name", "hint"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", _READ),
        ({"bits": 4}, "an unknown method", _READ),
        ({"quant_method": ["fp8"]}, "['fp8']", _READ),
        ({"quant_method": "quanto"}, "quanto", "aoconvert migrate"),
        ({"quant_method": "torchao"}, "torchao", "aoconvert migrate"),
    ],
)
def test_a_method_that_is_not_read(config: dict[str, Any], name: str, hint: str, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", quantization_config=config)
    with pytest.raises(SourceError) as caught:
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert caught.value.message == f"LlamaForCausalLM is already quantized ({name})"
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_a_config_that_says_gguf_of_other_files(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", quantization_config={"quant_method": "gguf"})
    with pytest.raises(SourceError, match="its config says that it is in a GGUF file, and it is not"):
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
