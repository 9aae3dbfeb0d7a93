"""Every first-set scheme on every family: bit-equal to torchao's own ``quantize_``, and opened by the library."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torchao.quantization import quantize_

import aoconvert
from aoconvert import schemes

SCHEMES = ["int8wo", "int8dq", "float8wo", "float8wo_e5m2", "int4dq", *(f"intx{bits}wo" for bits in range(1, 9))]


def weight_class(scheme: str) -> str:
    """torchao's class of a quantized weight."""
    if scheme.startswith("float8"):
        return "Float8Tensor"
    return "Int8Tensor" if scheme in ("int8wo", "int8dq") else "IntxUnpackedToInt8Tensor"


def reference(family: tiny.Family, source: Path) -> torch.nn.Module:
    """The unquantized model, loaded by its library in bfloat16."""
    if family.library == "diffusers":
        model = tiny.diffusers.AutoModel.from_pretrained(
            str(source), subfolder=family.component or None, torch_dtype=torch.bfloat16
        )
    else:
        model = getattr(tiny.transformers, family.opener).from_pretrained(source, dtype=torch.bfloat16)
    return model


def assert_same(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert type(ours) is type(theirs), name
    assert ours.shape == theirs.shape, name
    assert ours.dtype == theirs.dtype, name
    if hasattr(ours, "__tensor_flatten__"):
        names, context = ours.__tensor_flatten__()
        names_theirs, context_theirs = theirs.__tensor_flatten__()
        assert list(names) == list(names_theirs), name
        assert str(context) == str(context_theirs), name
        for inner in names:
            assert_same(f"{name}.{inner}", getattr(ours, inner), getattr(theirs, inner))
    else:
        assert torch.equal(
            ours.contiguous().reshape(-1).view(torch.uint8), theirs.contiguous().reshape(-1).view(torch.uint8)
        ), name


@pytest.mark.parametrize("scheme_name", SCHEMES)
@pytest.mark.parametrize("family_name", tiny.FAMILIES)
def test_bit_equal_and_opens(
    family_name: str, scheme_name: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    family = tiny.FAMILIES[family_name]
    source = checkpoints(family_name)
    floor = 0.3 if scheme_name == "int8dq" else family.min_quantized  # tiny models are half modulation layers
    result = aoconvert.quantize(
        source, scheme_name, output=tmp_path / "out", device="cpu", min_quantized=min(floor, family.min_quantized)
    )
    [component] = result.manifest.components
    quantized = {tensor.name for tensor in component.tensors if tensor.action == "quantize"}
    assert result.quantized_fraction > (0.05 if family.min_quantized == 0 else floor)

    model = reference(family, source)
    modules = {name.removesuffix(".weight") for name in quantized}
    config = schemes.get(scheme_name).config
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name in modules)
    expected = model.state_dict()
    written: dict[str, Any] = {}
    for file in component.files:
        if file.path.endswith(".bin"):
            path = tmp_path / "out" / file.path
            assert zipfile.ZipFile(path).testzip() is None
            written |= torch.load(path, weights_only=True, mmap=True)
    tied = {tensor.name for tensor in component.tensors if tensor.action == "tied"}
    assert set(written) | tied == set(expected)
    assert not set(written) & tied
    for name, tensor in written.items():
        assert_same(name, tensor, expected[name])
        assert type(tensor).__name__ == (weight_class(scheme_name) if name in quantized else "Tensor")
    del model, expected, written

    opened = tiny.open_result(family, tmp_path / "out")
    part = getattr(opened, family.component) if family.component else opened
    loaded = {
        f"{name}.weight"
        for name, module in part.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight.data) is not torch.Tensor
    }
    assert loaded == quantized
    with torch.no_grad():
        output = family.step(opened)
    assert output.isfinite().all()
