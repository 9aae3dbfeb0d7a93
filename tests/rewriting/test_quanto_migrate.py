"""``migrate`` of real folders that diffusers and Quanto itself wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.bits import bits
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.errors import PlanError, SourceError

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy" / "quanto"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONVOLUTION = "pos_embed.proj.weight"
DEVIATION = {"int4": 0.12, "int2": 0.022}


def opened(folder: Path) -> dict[str, Any]:
    """The state dict of what the library opens."""
    model = tiny.diffusers.PixArtTransformer2DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, use_safetensors=False
    )
    return dict(model.state_dict())


def check(folder: str, output: Path, **options: Any) -> Any:
    """Migrate; what the library opens then has Quanto's own values."""
    done = aoconvert.migrate(LEGACY / folder, output=output, **options)
    kind = folder.partition("-")[2]
    truth, stored = load_file(LEGACY / folder / "dequant.safetensors"), load_file(LEGACY / folder / WEIGHTS)
    state = opened(output)
    for name, values in truth.items():
        found = state[name].dequantize() if hasattr(state[name], "qdata") else state[name]
        if kind in DEVIATION and hasattr(state[name], "qdata"):
            step = stored[f"{name}._scale"].float().reshape(len(values), -1, 1)
            off = (found.float() - values.float()).abs().reshape(*step.shape[:2], -1)
            assert (off <= DEVIATION[kind] * step).all(), name
        else:
            assert torch.equal(found.nan_to_num(), values.nan_to_num()), name
    for name in state.keys() - truth.keys():
        assert torch.equal(bits(state[name]), bits(stored[name])), name
    return done


# every kind of values once, both kinds of folders, one convolution
@pytest.mark.parametrize(
    "folder",
    [
        *("diffusers-float8", "direct-int4"),
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("diffusers-int2", "diffusers-int4", "diffusers-int8", "direct-int8")
        ),
    ],
)
def test_a_folder(folder: str, tmp_path: Path) -> None:
    done = check(folder, tmp_path / "out")
    convolutions = int(folder.startswith("direct"))
    assert done.kind == "quanto"
    assert done.counts["carried"] == 16
    assert (done.counts["dequantized"], done.counts["requantized"]) == (convolutions, 0)
    reasons = {item.name: item.reason for item in done.deviations}
    assert (CONVOLUTION in reasons) == bool(convolutions)
    assert not (tmp_path / "out" / "quanto_qmap.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert aoconvert.verify(tmp_path / "out", reload=False).ok
    [component] = done.manifest.components
    left = {item.name for item in component.dropped}
    assert left == {name for name in load_file(LEGACY / folder / WEIGHTS) if name.endswith("put_scale")}


def test_a_transformers_model(tmp_path: Path) -> None:
    """Quanto's own folder of a Llama with a tied head: int4 in groups of 32, and activations that were quantized."""
    folder = LEGACY.parent / "quanto-transformers" / "llama-int4"
    done = aoconvert.migrate(folder, output=tmp_path / "out")
    assert (done.counts["carried"], done.counts["dequantized"]) == (7, 0)
    assert any(line.startswith("activations of 7 layers were quantized") for line in done.warnings)
    model = tiny.transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    truth, stored = load_file(folder / "dequant.safetensors"), load_file(folder / "model.safetensors")
    state = model.state_dict()
    for name, values in truth.items():
        step = stored[f"{name}._scale"].float().reshape(len(values), -1, 1)
        off = (state[name].dequantize().float() - values.float()).abs().reshape(*step.shape[:2], -1)
        assert (off <= DEVIATION["int4"] * step).all(), name
        assert state[name].block_size == (1, values.shape[1] if values.shape[1] == 64 else 32)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(bits(state[name]), bits(stored[name]))


def test_exact_values(tmp_path: Path) -> None:
    """Nothing is rounded; without the map, which no file needs, the result is the same."""
    copy = Path(shutil.copytree(LEGACY / "direct-int4", tmp_path / "copy"))
    (copy / "quanto_qmap.json").unlink()
    done = check("direct-int4", tmp_path / "out", exact=True)
    assert (done.counts["carried"], done.counts["dequantized"]) == (0, 17)
    assert not any(item.max_abs_error for item in done.deviations)
    aoconvert.migrate(copy, output=tmp_path / "again", exact=True)
    found = aoconvert.diff(tmp_path / "out", tmp_path / "again")
    assert (found.equal, found.same) == (True, 36)


def test_what_is_wholly_dequantized_is_a_plain_checkpoint(tmp_path: Path) -> None:
    done = aoconvert.migrate(LEGACY / "diffusers-int2", output=tmp_path / "out", exact=True)
    [part] = done.manifest.components
    assert (part.scheme, part.config, part.imports, part.loads_with) == ("plain", {}, [], {"torch": ">=2.6"})
    assert "quantization_config" not in json.loads((done.output / "config.json").read_text())
    card = aoconvert.card(done.output).text
    assert "nothing in it is quantized, it is a plain checkpoint" in card
    assert "pip install torch==" in card
    assert "import torchao" not in card
    assert aoconvert.verify(done.output, reload=False).ok
    assert aoconvert.inspect(str(done.output)).kind == "plain"
    assert all(not hasattr(tensor, "qdata") for tensor in opened(done.output).values())


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    """Everything that is missing, at once, and nothing is written."""
    copy = Path(shutil.copytree(LEGACY / "direct-int8", tmp_path / "copy"))
    tensors = load_file(copy / WEIGHTS)
    for name in ("proj_out.weight._scale", "caption_projection.linear_1.weight._scale"):
        del tensors[name]
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(PlanError) as caught:
        aoconvert.migrate(copy, output=tmp_path / "out")
    assert [problem.partition(" (")[0] for problem in caught.value.problems] == [
        "caption_projection.linear_1.weight has no _scale",
        "proj_out.weight has no _scale",
    ]
    (copy / WEIGHTS).write_bytes((LEGACY / "direct-int8" / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(SourceError, match="is truncated"):
        aoconvert.migrate(copy, output=tmp_path / "out")
    shutil.copy(LEGACY / "direct-int8" / WEIGHTS, copy / WEIGHTS)
    (copy / "quanto_qmap.json").write_text("[]")
    with pytest.raises(SourceError, match=r"quanto_qmap.json is not a table of modules"):
        aoconvert.migrate(copy, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantized_activations_are_said(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(LEGACY / "diffusers-int8", tmp_path / "copy"))
    tensors = load_file(copy / WEIGHTS)
    tensors["proj_out.input_scale"] = torch.tensor(0.03, dtype=torch.bfloat16)
    save_file(tensors, copy / WEIGHTS)
    done = aoconvert.migrate(copy, output=tmp_path / "out")
    [warning] = [line for line in done.warnings if "activations" in line]
    assert warning.startswith("activations of 1 layer were quantized with scales that were measured beforehand")
