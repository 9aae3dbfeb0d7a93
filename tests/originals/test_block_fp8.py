"""Sources in 8-bit floating point with a scale for each block."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import converted
from helpers.bits import assert_same
from helpers.checkpoints import build_llama, shard
from helpers.quantized_originals import StopAfter, assert_as_opened, block_fp8, edit, rewrite, written
from safetensors.torch import load_file

import aoconvert
from aoconvert.errors import Interrupted, SourceError
from aoconvert.models.base import ModelPart, SourceTensor
from aoconvert.originals import make_rows
from aoconvert.originals.base import Sorted
from aoconvert.originals.block_fp8 import BlockScaled, sort

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def build(folder: Path, block: tuple[int, int] | None = (32, 32), **changes: object) -> Path:
    config = {**FP8, "weight_block_size": list(block) if block else None}
    return rewrite(build_llama(folder, **changes), config, block_fp8(block))


@pytest.mark.parametrize("block", [(32, 32), (16, 32), None], ids=str)
def test_the_result_is_that_of_the_library_s_dequantized_model(block: tuple[int, int] | None, tmp_path: Path) -> None:
    source = build(tmp_path / "source", block)
    opened = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    result = assert_as_opened(source, opened, tmp_path)
    [component] = result.manifest.components
    assert component.original is not None
    assert component.original.method == "fp8"
    assert component.original.tensors == 14
    assert component.original.dequantized_by == f"transformers {transformers.__version__}"


def test_the_experts_of_a_mixture_are_merged_from_dequantized_ones(tmp_path: Path) -> None:
    converted.build("deepseek-v3", tmp_path / "source")
    source = rewrite(tmp_path / "source", {**FP8, "weight_block_size": [8, 16]}, block_fp8((8, 16)))
    opened = transformers.DeepseekV3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert_as_opened(source, opened, tmp_path)


def test_blocks_that_are_cut_off_at_the_edges_have_their_own_scales(tmp_path: Path) -> None:
    block = (48, 48)  # of 64 rows and 160 columns: the library refuses these
    source = build(tmp_path / "source", block)
    state = load_file(source / "model.safetensors")
    plain = {
        name: spread(tensor, state.get(f"{name}_scale_inv"), block)
        for name, tensor in state.items()
        if not name.endswith("_scale_inv")
    }
    build_llama(tmp_path / "plain", tensors=plain)
    for name in ("source", "plain"):
        aoconvert.quantize(tmp_path / name, "int8wo", output=tmp_path / f"{name}-out", device="cpu")
    here, there = written(tmp_path / "source-out"), written(tmp_path / "plain-out")
    for name, tensor in there.items():
        assert_same(here[name], tensor, name)


def spread(codes: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]) -> torch.Tensor:
    """The format's own words: each value times the scale of its block."""
    if scale is None:
        return codes
    rows, columns = codes.shape
    each = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (codes.float() * each).to(torch.bfloat16)


@pytest.mark.parametrize("rows", [(0, 150), (0, 1), (31, 33), (100, 150), (149, 150)], ids=str)
def test_any_rows_are_those_of_the_whole(rows: tuple[int, int]) -> None:
    weight = torch.randn(150, 70)
    stored = {f"w{name}": tensor for name, tensor in block_fp8((32, 32))("", weight).items()}
    codes, scale = (SourceTensor("f", n, t.dtype, tuple(t.shape), t.nbytes) for n, t in stored.items())
    tensor = SourceTensor("f", "w", torch.float32, (150, 70), 0, formula=BlockScaled(codes, scale, (32, 32)))

    def load(part: SourceTensor, rows: tuple[int, int] | None) -> torch.Tensor:
        whole = stored[part.name]
        return whole if rows is None else whole[rows[0] : rows[1]]

    each = stored["w_scale_inv"].repeat_interleave(32, 0)[:150].repeat_interleave(32, 1)[:, :70]
    expected = (stored["w"].float() * each)[rows[0] : rows[1]]
    assert_same(make_rows(tensor, rows, load), expected)
    room = torch.empty(150 * 70 * 4, dtype=torch.uint8)
    made = make_rows(tensor, rows, load, room, torch.bfloat16)
    assert_same(made, expected.bfloat16())
    assert made.data_ptr() == room.data_ptr()


@pytest.mark.parametrize("experts", [None, 3])
def test_two_values_in_a_byte(experts: int | None) -> None:
    """OCP MX, 5.3.3: what four bits of e2m1 mean; the first value of a pair is in the low bits."""
    meaning = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    meaning = torch.cat([meaning, -meaning])
    shape = (48, 64) if experts is None else (experts, 48, 64)
    bits = torch.randint(16, shape)
    packed = (bits[..., ::2] | bits[..., 1::2] << 4).to(torch.uint8).view(torch.int8)
    scale = torch.rand(*shape[:-1], 2)
    stored = {"w.weight": packed, "w.weight_scale_inv": scale}
    tensors = {n: SourceTensor("f", n, t.dtype, tuple(t.shape), t.nbytes) for n, t in stored.items()}
    part = ModelPart("", "", "transformers", "M", {})
    found = Sorted(part, {"weight_block_size": [128, 128]}, tensors, lambda part: stored[part.name])
    assert sort(found) == "float4 with a scale for each block of 1×32"
    assert found.made["w.weight"].codes is None  # no class of torchao holds them so

    def load(part: SourceTensor, rows: tuple[int, int] | None) -> torch.Tensor:
        return stored[part.name] if rows is None else stored[part.name][rows[0] : rows[1]]

    expected = meaning[bits] * scale.repeat_interleave(32, -1)
    for start, stop in ((0, shape[0]), (1, 2), (shape[0] - 1, shape[0])):
        assert_same(make_rows(found.made["w.weight"], (start, stop), load), expected[start:stop])


def test_dtype_auto_is_what_the_config_says(tmp_path: Path) -> None:
    plan = aoconvert.plan(build(tmp_path / "source", torch_dtype="float16"), "int8wo", device="cpu", dtype="auto")
    [component] = plan.components
    assert component.original is not None
    assert {tensor.dtype for tensor in component.tensors} == {"float16"}
    down = next(t for t in component.tensors if t.name == "model.layers.0.mlp.down_proj.weight")
    assert down.bytes_in == 64 * 160 + 4 * 2 * 5


K = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop(f"{K}_scale_inv"), f"{K} is float8_e4m3fn, and no scale belongs to it"),
        (
            lambda state: state.update({f"{K}_scale_inv": torch.ones(3, 2)}),
            f"{K}_scale_inv has the shape [3, 2], but {K} needs [1, 2]",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if name.endswith("_scale_inv")],
            "model.layers.0.mlp.down_proj.weight is float8_e4m3fn, and no scale belongs to it (and 13 more likewise)",
        ),
    ],
    ids=["missing", "other shape", "none at all"],
)
def test_scales_that_do_not_fit_are_named(change: Any, problem: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    edit(source, change)
    with pytest.raises(SourceError) as caught:
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert caught.value.message == f"LlamaForCausalLM: {problem}"
    assert caught.value.hint is not None
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_a_config_that_speaks_of_quantization_of_plain_weights(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "source", quantization_config=FP8)
    with pytest.raises(SourceError, match="its config says that it is quantized \\(fp8\\), but none of its tensors is"):
        aoconvert.plan(source, "int8wo", output=tmp_path / "out", device="cpu")


def test_scales_of_activations_are_left_out_by_name(tmp_path: Path) -> None:
    source = build(tmp_path / "source", None)
    name = K.replace(".weight", ".activation_scale")
    edit(source, lambda state: state.update({name: torch.ones(())}))
    [component] = aoconvert.plan(source, "int8wo", output=tmp_path / "out", device="cpu").components
    assert [(item.name, item.reason) for item in component.dropped] == [
        (name, "scales activations that the original quantizes; torchao computes such scales from each input")
    ]


def test_verify_and_the_card_know_that_the_original_was_quantized(tmp_path: Path) -> None:
    """The library opens the source dequantized, and its values are those of the result."""
    source = build(tmp_path / "source")
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    report = aoconvert.verify(tmp_path / "out", source=str(source))
    checks = {check.name: check for check in report.checks}
    assert {check.status for check in checks.values()} == {"passed"}, report
    assert checks["library"].detail.startswith("7 tensors have the source's bits, 14 are within their SQNR")
    card = aoconvert.card(tmp_path / "out").text
    assert "the source was quantized already (fp8: float8 with a scale for each block of 32×32)" in card


@pytest.mark.exhaustive
def test_what_the_library_cannot_dequantize_is_compared_with_what_was_read(tmp_path: Path) -> None:
    source = build(tmp_path / "source", (48, 48))
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    report = aoconvert.verify(tmp_path / "out", source=str(source))
    checks = {check.name: check for check in report.checks}
    assert checks["library"].status == "skipped"
    assert checks["library"].detail.startswith("the library takes blocks of equal size only, and the last ones of")
    assert "21 tensors compared with what aoconvert itself reads" in checks["numbers"].detail


def test_layers_that_the_class_does_not_know_are_carried_over_dequantized(tmp_path: Path) -> None:
    """DeepSeek-V3's layer for multi-token prediction is in block-FP8 like the others."""
    source, name = build(tmp_path / "source"), "model.layers.2.mtp.weight"
    weight = torch.randn(40, 64)
    edit(source, lambda state: state.update(block_fp8((32, 32))(name, weight)))
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    [entry] = [t for t in result.manifest.components[0].tensors if t.action == "carry"]
    assert (entry.name, entry.reason) == (name, "the model class does not know it; dequantized")
    stored = load_file(source / "model.safetensors")
    assert_same(written(tmp_path / "out")[name], spread(stored[name], stored[f"{name}_scale_inv"], (32, 32)))


def test_shards_that_a_weight_and_its_scales_are_in_different_ones_of(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "shards")
    shard(tmp_path / "shards", "model", count=3)
    for name in ("whole", "shards"):
        aoconvert.quantize(tmp_path / name, "int8wo", output=tmp_path / f"{name}-out", device="cpu")
    here, there = written(tmp_path / "shards-out"), written(tmp_path / "whole-out")
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert_same(here[name], tensor, name)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    with pytest.raises(Interrupted):
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", progress=StopAfter())
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert result.resumed > 0
    aoconvert.quantize(source, "int8wo", output=tmp_path / "whole", device="cpu")
    file = "pytorch_model.bin"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
