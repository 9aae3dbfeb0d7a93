"""GGUF files of denoisers, in their authors' names: what is read equals what diffusers converts, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter
from gguf import GGMLQuantizationType as Kind
from helpers import gguf_files
from helpers.authors_names import MODELS
from helpers.bits import assert_same

import aoconvert
from aoconvert.engine.read import ComponentReading
from aoconvert.errors import SourceError


def build(folder: Path, name: str, kind: Kind) -> tuple[Path, Path, Any, dict[str, torch.Tensor]]:
    """The file, its config, the model's class, and the values that gguf itself reads."""
    make, rename = MODELS[name]
    torch.manual_seed(0)
    model = make()
    model.save_config(folder / "config")
    tensors = {}
    for key, tensor in rename(model.state_dict()).items():
        array = tensor.float().contiguous().numpy()
        fits = array.ndim == 2 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        tensors[key] = (array, kind if fits else Kind.F16 if array.ndim > 1 else Kind.F32)
    file = gguf_files.write(folder / f"{name}.gguf", name, {}, tensors)
    values = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(file).tensors
    }
    return file, folder / "config", type(model), values


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd3", Kind.Q4_0),
        pytest.param("flux", Kind.Q8_0, marks=pytest.mark.exhaustive),
        pytest.param("wan", Kind.Q5_0, marks=pytest.mark.exhaustive),
        pytest.param("ltx", Kind.BF16, marks=pytest.mark.exhaustive),
    ],
)
def test_the_tensors_are_those_that_diffusers_makes_of_the_values(name: str, kind: Kind, tmp_path: Path) -> None:
    file, config, cls, values = build(tmp_path, name, kind)
    plan = aoconvert.plan(file, "int8wo", device="cpu", config=config, dtype="float32", min_quantized=0.0)
    [component] = plan.components
    reference = cls.from_single_file(dict(values), config=str(config), local_files_only=True).float().state_dict()
    own = cls.from_single_file(
        str(file),
        config=str(config),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        local_files_only=True,
    )
    packed = {name for name, tensor in own.state_dict().items() if tensor.dtype == torch.uint8}
    assert packed
    own.dequantize()
    theirs = own.state_dict()
    assert {tensor.name for tensor in component.tensors} == set(reference) == set(theirs)
    with ComponentReading(component, plan, tmp_path) as reading:
        for tensor in component.tensors:
            made = reading.read(tensor, None, None).float()
            assert_same(made, reference[tensor.name], tensor.name)
            # diffusers dequantizes in float16 what gguf dequantizes in float32; outside of linear layers it does not
            if not isinstance(found := theirs[tensor.name], GGUFParameter):
                assert_same(made.half(), found.half(), tensor.name)


def test_the_original_is_in_the_manifest_and_on_the_card(tmp_path: Path) -> None:
    file, config, _, _ = build(tmp_path, "sd3", Kind.Q8_0)
    result = aoconvert.quantize(file, "int8wo", output=tmp_path / "out", device="cpu", config=config, min_quantized=0.0)
    [component] = result.manifest.components
    assert component.original is not None
    assert component.original.method == "gguf"
    assert component.original.how.startswith("Q8_0 ×")
    assert component.dtype == "bfloat16"
    assert "the source was quantized already (gguf: Q8_0" in aoconvert.card(tmp_path / "out").text


def test_without_a_config_a_layout_that_nobody_knows_is_named(tmp_path: Path) -> None:
    values = torch.zeros(4, 32).numpy()
    file = gguf_files.write(tmp_path / "m.gguf", "pig", {}, {"some.weight": (values, Kind.Q8_0)})
    with pytest.raises(SourceError, match="has no conversion for a GGUF file of the architecture 'pig'"):
        aoconvert.plan(file, "int8wo", device="cpu")
