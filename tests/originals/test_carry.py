"""``--carry``: codes of a quantized original that a class of torchao holds as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import build_llama
from helpers.quantized_originals import StopAfter, block_fp8, compressed, edit, modelopt, rewrite, written
from safetensors.torch import load_file

import aoconvert
from aoconvert.engine import read_ahead
from aoconvert.errors import Interrupted, PlanError, UsageError
from aoconvert.planning import slices

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (pip install -e .[test])")

FP8 = {"num_bits": 8, "type": "float"}
INT8 = {"num_bits": 8, "type": "int"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
K = "model.layers.0.self_attn.k_proj.weight"
# kind of original → (its config, what it stores)
KINDS: dict[str, Any] = {
    "fp8 rows": lambda: compressed("float-quantized", **FP8, strategy="channel"),
    "fp8 tensor": lambda: compressed("float-quantized", **FP8, strategy="tensor"),
    "int8 rows": lambda: compressed("int-quantized", **INT8, strategy="channel"),
    "int4 rows": lambda: compressed("int-quantized", **{**INT8, "num_bits": 4}, strategy="channel"),
    "modelopt": modelopt,
    "modelopt rows": lambda: modelopt(per_row=True),
    "blocks": lambda: (BLOCKS, block_fp8((128, 128))),
    "one block": lambda: ({**BLOCKS, "weight_block_size": None}, block_fp8(None)),
}
FITTING = [
    ("fp8 rows", "float8wo", {}),
    ("fp8 rows", "float8dq_row", {}),
    ("fp8 tensor", "float8wo", {}),
    ("fp8 tensor", "float8dq", {}),
    ("fp8 tensor", "float8wo", {"granularity": "per_tensor"}),
    ("int8 rows", "int8wo", {}),
    ("int8 rows", "int8dq", {}),
    ("int4 rows", "int8wo", {}),
    ("modelopt", "float8dq", {}),
    ("modelopt rows", "float8wo", {}),
    ("blocks", "float8dq_block", {}),
    ("one block", "float8wo", {}),
]
FIRST = FITTING[0], FITTING[2], FITTING[3], FITTING[6], FITTING[10]


def build(folder: Path, kind: str) -> Path:
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 1, "num_key_value_heads": 1}
    return rewrite(build_llama(folder, **(wide if kind == "blocks" else {})), *KINDS[kind]())


def quantize(source: Path, scheme: str, output: Path, **options: Any) -> Any:
    return aoconvert.quantize(source, scheme, output=output, device="cpu", carry=True, **options)


@pytest.mark.parametrize(
    ("kind", "scheme", "settings"),
    [pytest.param(*each, marks=() if each in FIRST else pytest.mark.exhaustive) for each in FITTING],
)
def test_codes_and_values_are_those_of_the_original(
    kind: str, scheme: str, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales are stored in bfloat16 or float32, which float32 holds; so a product is rounded once, to bfloat16."""
    for module in (slices, read_ahead):
        monkeypatch.setattr(module, "SLICE_BYTES", 1 << 12)  # several slices of a matrix
    source = build(tmp_path / "source", kind)
    stored = load_file(source / "model.safetensors")
    made = quantize(source, scheme, tmp_path / "carried", settings=settings)
    aoconvert.quantize(source, scheme, output=tmp_path / "again", device="cpu", settings=settings)
    here, again = written(tmp_path / "carried"), written(tmp_path / "again")
    [component] = made.manifest.components
    entries = {tensor.name: tensor for tensor in component.tensors}
    quantized = [name for name, entry in entries.items() if entry.action == "quantize"]
    assert len(quantized) == 14
    for name in quantized:
        tensor, like = here[name], again[name]
        assert torch.equal(tensor.qdata.view(torch.uint8), stored[name].view(torch.uint8))
        scale = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv")).float()
        assert torch.equal(
            tensor.scale, scale.reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1).expand_as(like.scale)
        )
        assert type(tensor) is type(like)
        names, context = tensor.__tensor_flatten__()
        assert (names, str(context)) == (like.__tensor_flatten__()[0], str(like.__tensor_flatten__()[1]))
        for inner in names:
            one, other = getattr(tensor, inner), getattr(like, inner)
            assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert entries[name].reason == "carried: the same codes as the original"
        # to what the original's library makes of them there is no difference
        assert (entries[name].sqnr_db, entries[name].max_abs_error) == (None, 0.0)
    assert component.original is not None
    assert component.original.carried == 14


def test_the_library_gives_the_same_values(tmp_path: Path) -> None:
    import transformers

    source = build(tmp_path / "source", "fp8 tensor")
    quantize(source, "float8dq", tmp_path / "out")
    given = {**transformers.AutoConfig.from_pretrained(source).quantization_config, "dequantize": True}
    config = transformers.CompressedTensorsConfig.from_dict(given)
    cls = transformers.LlamaForCausalLM
    original = cls.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config).state_dict()
    with torch.device("meta"):
        assigned = cls(transformers.AutoConfig.from_pretrained(tmp_path / "out"))
    assigned.load_state_dict(written(tmp_path / "out"), assign=True)
    for model in (cls.from_pretrained(tmp_path / "out"), assigned):
        for name, tensor in model.state_dict().items():
            values = tensor.dequantize() if hasattr(tensor, "__tensor_flatten__") else tensor
            assert torch.equal(values, original[name]), name


def test_other_dtypes_differ_by_the_rounding_of_the_library(tmp_path: Path) -> None:
    """compressed-tensors multiplies in the dtype of the scales, bfloat16 here; torchao always in float32."""
    source = build(tmp_path / "source", "fp8 rows")
    stored = load_file(source / "model.safetensors")
    made = quantize(source, "float8wo", tmp_path / "out", dtype="float32")
    found = written(tmp_path / "out")[K].dequantize()
    exact = stored[K].float() * stored[f"{K}_scale"].float()
    assert torch.equal(found, exact)
    entry = next(tensor for tensor in made.manifest.components[0].tensors if tensor.name == K)
    rounded = stored[K].to(torch.bfloat16) * stored[f"{K}_scale"]
    assert entry.max_abs_error == (exact - rounded.float()).abs().max()
    assert entry.sqnr_db is not None
    assert 50 < entry.sqnr_db < 60  # half a step of bfloat16


def test_what_does_not_fit_is_quantized_again_and_said(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "fp8 rows")
    weight = load_file(source / "model.safetensors")[K].float().bfloat16()
    edit(source, lambda state: (state.update({K: weight}), state.pop(f"{K}_scale")))
    made = quantize(source, "float8wo", tmp_path / "carried")
    aoconvert.quantize(source, "float8wo", output=tmp_path / "again", device="cpu")
    here, again = written(tmp_path / "carried"), written(tmp_path / "again")
    assert torch.equal(here[K].qdata.view(torch.uint8), again[K].qdata.view(torch.uint8))
    [component] = made.manifest.components
    entry = next(tensor for tensor in component.tensors if tensor.name == K)
    assert entry.reason == "not carried: the original does not quantize it"
    assert component.original is not None
    assert component.original.carried == 13
    assert any(line.endswith(f"13 weights keep the codes of the original; 1 {entry.reason}") for line in made.warnings)


@pytest.mark.parametrize(
    ("kind", "scheme", "problem"),
    [
        (
            "fp8 rows",
            "float8dq",
            "none of the source's codes can be kept: 14 weights not carried: the original has a scale for each row, "
            "and float8dq has one per tensor",
        ),
        (
            "fp8 rows",
            "int8wo",
            "none of the source's codes can be kept: 14 weights not carried: the original has codes of float8_e4m3fn, "
            "which int8wo does not store",
        ),
        (None, "float8wo", "the source is not quantized (omit --carry)"),
    ],
)
def test_nothing_to_carry_is_refused(kind: str | None, scheme: str, problem: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", kind) if kind else build_llama(tmp_path / "source")
    with pytest.raises(PlanError) as caught:
        quantize(source, scheme, tmp_path / "out")
    assert caught.value.problems == (f"--carry: {problem}",)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_with_auto_it_is_refused() -> None:
    with pytest.raises(UsageError, match="--carry and --scheme auto exclude each other"):
        aoconvert.plan("user/model", "auto", carry=True, target_bits=5)


@pytest.mark.parametrize("before", [True, False])
def test_a_stopped_run_goes_on_where_it_is_the_same(before: bool, tmp_path: Path) -> None:
    """Of a run that carried nothing, no tensor is taken over, and the other way round."""
    source = build(tmp_path / "source", "fp8 rows")
    options: dict[str, Any] = {"scheme": "float8wo", "device": "cpu", "output": tmp_path / "out"}
    with pytest.raises(Interrupted):
        aoconvert.quantize(source, carry=before, progress=StopAfter(), **options)
    result = aoconvert.quantize(source, carry=True, **options)
    assert (result.resumed > 0) == before
    quantize(source, "float8wo", tmp_path / "whole")
    name = "pytorch_model.bin"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "scheme"), [("fp8 tensor", "float8wo"), ("modelopt", "float8wo"), ("int8 rows", "int8dq")]
)
def test_the_result_is_verified(kind: str, scheme: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", kind)
    quantize(source, scheme, tmp_path / "out")
    report = aoconvert.verify(tmp_path / "out", source=str(source))
    found = {check.name: check.status for check in report.checks}
    # transformers cannot dequantize ModelOpt's
    assert {name for name, status in found.items() if status != "passed"} == (
        {"library"} if kind == "modelopt" else set()
    )
    assert report.ok
    card = aoconvert.card(tmp_path / "out").text
    assert "14 of its 14 quantized tensors keep the codes" in card
    assert "carried: the same codes as the original" in card
