"""Sources by compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fake_hub.fixtures import HubClient
from helpers.checkpoints import build_llama
from helpers.quantized_originals import assert_as_opened, compressed, edit, rewrite

import aoconvert
from aoconvert.errors import SourceError
from aoconvert.models.base import SourceTensor
from aoconvert.originals import make_rows
from aoconvert.originals.base import Sorted
from aoconvert.originals.compressed import sort

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (pip install -e .[test])")

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
FP4 = {"num_bits": 4, "type": "float"}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 rows": ("float-quantized", FP8),
    "fp8 tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8 tensor with static activations": (
        "float-quantized",
        {**FP8, "strategy": "tensor", "activations": STATIC},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
    ),
    "fp8 blocks": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 32]}),
    "int8 rows": ("int-quantized", {**FP8, "type": "int"}),
    "int8 rows with zero points": ("int-quantized", {**FP8, "type": "int", "symmetric": False}),
    "int8 packed": ("pack-quantized", {**FP8, "type": "int"}),
    "int4 groups": ("pack-quantized", INT4),
    "int4 groups with zero points": ("pack-quantized", {**INT4, "symmetric": False}),
    "int3 groups with zero points": ("pack-quantized", {**INT4, "num_bits": 3, "symmetric": False}),
}
FIRST = ("fp8 rows", "int4 groups with zero points")


def build(folder: Path, kind: str, **changes: Any) -> Path:
    form, weights = KINDS[kind]
    return rewrite(build_llama(folder, **changes), *compressed(form, **weights))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FIRST else pytest.mark.exhaustive) for kind in KINDS]
)
def test_the_result_is_that_of_the_library_s_dequantized_model(kind: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", kind)
    config = transformers.CompressedTensorsConfig.from_dict(
        {**transformers.AutoConfig.from_pretrained(source).quantization_config, "dequantize": True}
    )
    opened = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    result = assert_as_opened(source, opened, tmp_path)
    [component] = result.manifest.components
    assert component.original is not None
    assert component.original.tensors == 14
    assert component.original.how.startswith(KINDS[kind][0])


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_are_those_of_the_whole(kind: str) -> None:
    form, weights = KINDS[kind]
    config, stored = compressed(form, **weights)
    values = dict(stored("m.weight", torch.randn(160, 64).bfloat16()))
    tensors = {name: SourceTensor("f", name, t.dtype, tuple(t.shape), t.nbytes) for name, t in values.items()}

    def load(part: SourceTensor, rows: tuple[int, int] | None) -> torch.Tensor:
        return values[part.name] if rows is None else values[part.name][rows[0] : rows[1]]

    found = Sorted("M", config, dict(tensors), lambda part: values[part.name])
    sort(found)
    tensor = found.made["m.weight"]
    assert not found.left
    from compressed_tensors.compressors import BaseCompressor

    formula: Any = tensor.formula
    local = {name.removeprefix("m."): value for name, value in values.items()}
    whole = BaseCompressor.get_value_from_registry(form).decompress(local, formula.scheme)["weight"]
    assert whole.dtype == tensor.dtype
    for start, stop in ((0, 160), (0, 1), (5, 39), (31, 33), (159, 160)):
        assert torch.equal(make_rows(tensor, (start, stop), load), whole[start:stop])


K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop(f"{K}.weight_scale"), f"{K}.weight is float8_e4m3fn, and no scale belongs to it"),
        (
            lambda state: state.update({f"{K}.weight_scale": torch.ones(5, 1)}),
            f"{K}.weight_scale has the shape [5, 1], but its weight needs [32, 1]",
        ),
        (
            lambda state: state.update({f"{K}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
            "it is quantized by compressed-tensors with columns in another order "
            f"({K}.weight_g_idx), which is not read",
        ),
    ],
    ids=["missing", "other shape", "g_idx"],
)
def test_what_does_not_fit_is_named(change: Any, problem: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "fp8 rows")
    edit(source, change)
    with pytest.raises(SourceError) as caught:
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert caught.value.message == f"LlamaForCausalLM: {problem}"
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_verify_has_the_library_dequantize_the_original(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "int4 groups with zero points")
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    report = aoconvert.verify(tmp_path / "out", source=str(source))
    checks = {check.name: check for check in report.checks}
    assert {check.status for check in checks.values()} == {"passed"}, report
    assert checks["library"].detail.startswith("7 tensors have the source's bits, 14 are within their SQNR")


def test_a_plan_of_a_repo_reads_what_says_how_it_is_stored_and_no_weights(
    hub_client: HubClient, tmp_path: Path
) -> None:
    """The shape of a packed matrix is a tensor of its own."""
    source = build(tmp_path / "source", "int4 groups")
    hub_client.hub.state.create_repo("user/model")
    hub_client.hub.state.commit("user/model", {path.name: path for path in source.iterdir()})
    made = hub_client.run("import aoconvert\nresult = aoconvert.plan('user/model', 'int8wo', device='cpu').to_dict()")
    local = json.loads(json.dumps(aoconvert.plan(source, "int8wo", device="cpu").to_dict()))
    assert made["components"] == local["components"]
    assert made["components"][0]["original"]["method"] == "compressed-tensors"
