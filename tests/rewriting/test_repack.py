"""Repacking: what quantizing for the other device gives, or an answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizing import quantize_for
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.errors import Interrupted, PlanError, QuantizeError, SourceError, UsageError, VerificationError
from aoconvert.progress import Silent
from aoconvert.schemes import cpu_packing
from aoconvert.schemes import int4 as layouts
from aoconvert.schemes.tensors import dequantize, take_apart
from aoconvert.verification.load_device import choose_load_device

OTHER = {"cpu": "cuda", "cuda": "cpu"}
HQQ = {"settings": {"int4_choose_qparams_algorithm": "hqq"}}


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; of the manifest all that does not differ from run to run."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    manifest = json.loads(found["aoconvert.json"])
    del manifest["run"]
    return {**found, "aoconvert.json": manifest}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("options", [{}, HQQ], ids=["tinygemm", "hqq"])
def test_it_is_what_quantizing_for_the_device_gives(
    int4: Any, tmp_path: Path, device: str, options: dict[str, Any]
) -> None:
    made = aoconvert.repack(int4(OTHER[device], **options), device, output=tmp_path / "out")
    assert made.weights == 14
    assert contents(made.output) == contents(int4(device, **options))


def test_shards_stay_as_they_were_cut(int4: Any, tmp_path: Path) -> None:
    """Quantizing would cut them anew: what is filled up for CUDA changes what fits in a file."""
    sharded = int4("cpu", group_size=32, max_shard_size="150KB")
    there = aoconvert.repack(sharded, "cuda", output=tmp_path / "there")
    assert left(there.output) == left(sharded)
    index = json.loads((there.output / "pytorch_model.bin.index.json").read_text())
    assert index["metadata"]["total_size"] == there.manifest.components[0].totals.bytes_out
    back = aoconvert.repack(there.output, "cpu", output=tmp_path / "back")
    assert contents(back.output) == contents(sharded)


def test_every_value_is_carried_where_the_layouts_choose_other_scales(source: Any, tmp_path: Path) -> None:
    """torchao's least scale is 1e-6 on the CPU and far smaller for CUDA: repacked, it stays what it was."""
    shutil.copytree(source(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3] = 0.0
    tensors[name][5] = 1e-9
    save_file(tensors, weights)
    for device in ("cpu", "cuda"):
        quantize_for(device, tmp_path / "model", tmp_path / device)
    aoconvert.repack(tmp_path / "cpu", "cuda", output=tmp_path / "repacked")
    here, direct, repacked = (weight(tmp_path / folder, name) for folder in ("cpu", "cuda", "repacked"))
    for part in ("codes", "scale", "zero"):
        assert torch.equal(getattr(take_apart(here), part), getattr(take_apart(repacked), part))
    assert not torch.equal(take_apart(direct).scale, take_apart(repacked).scale)
    assert torch.equal(dequantize(here), dequantize(repacked))


def weight(folder: Path, name: str) -> Any:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)[name]


def test_other_schemes_in_the_model_stay_as_they_are(source: Any, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        recipe = tmp_path / f"{device}.toml"
        recipe.write_text(
            f'''default = {{ scheme = "int4wo", group_size = 64, layout_device = "{device}" }}
            rule = [
                {{ match = "re:.*up_proj", scheme = "int8wo" }},
                {{ match = "re:.*gate_proj", scheme = "int4wo", group_size = 32, layout_device = "{device}" }},
            ]'''.replace("            ", "")
        )
        options: dict[str, Any] = {"recipe": recipe, "device": "cpu", "min_quantized": 0.0}
        aoconvert.quantize(source(), output=tmp_path / device, **options)
    done = aoconvert.repack(tmp_path / "cpu", "cuda", output=tmp_path / "out")
    assert done.weights == 12
    repacked, direct = contents(done.output), contents(tmp_path / "cuda")
    assert {**repacked, "aoconvert.json": None} == {**direct, "aoconvert.json": None}
    entry, expected = (found["aoconvert.json"]["components"][0] for found in (repacked, direct))
    for key in ("config", "files", "tensors", "totals", "safe_globals"):
        assert entry[key] == expected[key]
    assert entry["layout"]["packing"] == expected["layout"]["packing"] == "tile_packed_to_4d+plain"


def test_a_pipeline_keeps_its_other_parts(pipeline: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"min_quantized": 0.0, "device": "cpu", "group_size": 32}
    components = {"transformer": "int4wo", "text_encoder": "int8wo"}
    for device in ("cpu", "cuda"):
        aoconvert.quantize(
            pipeline, "int4wo", layout_device=device, components=components, output=tmp_path / device, **options
        )
    (tmp_path / "cpu" / "README.md").write_text("an old card")
    (tmp_path / "cpu" / "aoconvert.verify.json").write_text("{}")
    done = aoconvert.repack(tmp_path / "cpu", "cuda", output=tmp_path / "out")
    assert set(done.before) == {"transformer"}
    assert contents(tmp_path / "out") == contents(tmp_path / "cuda")


def test_a_model_for_the_cpu_made_of_one_for_cuda_computes(int4: Any, tmp_path: Path) -> None:
    aoconvert.repack(int4("cuda"), "cpu", output=tmp_path / "out")
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        repacked, direct = (aoconvert.load(place)(tokens).logits for place in (tmp_path / "out", int4("cpu")))
    assert torch.equal(repacked, direct)
    assert torch.isfinite(repacked).all()


def test_what_the_layout_cannot_hold_exactly_is_refused_by_name(int4: Any, tmp_path: Path) -> None:
    for device, other in (("cpu", "xpu"), ("xpu", "cuda")):
        with pytest.raises(QuantizeError, match=r"mlp\.down_proj\.weight cannot be repacked for .* zero point"):
            aoconvert.repack(int4(device), other, output=tmp_path / "out")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "device", "to", "said"),
    [
        ({"dtype": "float16"}, "cpu", "cuda", "q_proj.weight: int4 for cuda needs bfloat16, not float16"),
        ({"group_size": 256, "shape": {"hidden_size": 256}}, "cuda", "cpu", "int4 for cpu has no group size 256"),
        (
            {"shape": {"num_attention_heads": 16, "num_key_value_heads": 1}},
            "cuda",
            "cpu",
            "k_proj.weight: out_features 8 is not a multiple of 16",
        ),
        ({}, "cpu", "cpu", "already packed for cpu"),
        ({}, "cuda", "cuda", "already packed for cuda"),
    ],
)
def test_what_is_in_the_way_is_said_before_any_work(
    int4: Any, tmp_path: Path, options: dict[str, Any], device: str, to: str, said: str
) -> None:
    with pytest.raises(PlanError) as refused:
        aoconvert.repack(int4(device, **options), to, output=tmp_path / "out")
    assert any(said in problem for problem in refused.value.problems)
    assert left(tmp_path) == []


def test_only_checkpoints_with_int4_are_repacked(int4: Any, source: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no aoconvert\.json"):
        aoconvert.repack(tmp_path, "cuda")
    aoconvert.quantize(source(), "int8wo", output=tmp_path / "int8", device="cpu", min_quantized=0.0)
    with pytest.raises(PlanError, match="no int4 weights"):
        aoconvert.repack(tmp_path / "int8", "cuda", output=tmp_path / "out")
    with pytest.raises(UsageError, match="device 'tpu' has no layout"):
        aoconvert.repack(int4("cpu"), "tpu", output=tmp_path / "out")
    assert left(tmp_path) == ["int8"]


def test_nothing_is_replaced_unasked(int4: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(int4("cpu"), folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    for output in (folder, tmp_path, folder / "inside", tmp_path / "out"):
        with pytest.raises(PlanError, match="output"):
            aoconvert.repack(folder, "cuda", output=output, overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    first = aoconvert.repack(folder, "cuda")
    assert first.output == tmp_path / "model-cuda"
    with pytest.raises(PlanError, match="--overwrite"):
        aoconvert.repack(folder, "cuda")
    (first.output / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match=r"changed since: notes\.txt"):
        aoconvert.repack(folder, "cuda", overwrite=True)
    (first.output / "notes.txt").unlink()
    again = aoconvert.repack(folder, "cuda", overwrite=True)
    assert contents(again.output) == contents(int4("cuda"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "config.json", "generation_config.json"])
def test_a_file_that_is_not_what_the_manifest_lists_is_refused(int4: Any, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(int4("cpu"), folder)
    content = bytearray((folder / file).read_bytes())
    if file.endswith(".bin"):
        content[100_000] ^= 1  # in the middle of a weight
    else:
        content += b" "
    (folder / file).unlink()  # it may be a link to what other tests read
    (folder / file).write_bytes(content)
    with pytest.raises(SourceError, match="is not what the manifest lists"):
        aoconvert.repack(folder, "cuda")
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "config.json", "generation_config.json"])
def test_a_file_that_is_gone_is_missed_before_any_work(int4: Any, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(int4("cpu"), folder)
    (folder / file).unlink()
    with pytest.raises(SourceError, match=f"has no file {file}"):
        aoconvert.repack(folder, "cuda", progress=_Unstarted())
    assert left(tmp_path) == ["model"]


class _Unstarted(Silent):
    def start(self, stage: str, total_bytes: int) -> None:
        raise AssertionError(f"{stage} has begun")


class _Stopped(Silent):
    """Ctrl-C at some tensor."""

    def advance(self, nbytes: int, current: str = "") -> None:
        if current.startswith("model.layers.1"):
            raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing(int4: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="unfinished output was removed"):
        aoconvert.repack(int4("cpu"), "cuda", output=tmp_path / "out", progress=_Stopped())
    assert left(tmp_path) == []


@pytest.mark.parametrize("layout", [name for name in cpu_packing.LAYOUTS if name != layouts.machine_layout()][-1:])
def test_a_checkpoint_for_another_cpu_is_said_refused_and_repacked(
    int4: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        patch.setattr(cpu_packing, "machine_layout", lambda: layout)
        aoconvert.repack(int4("cuda"), "cpu", output=elsewhere)
    assert manifests.load(elsewhere).components[0].layout.packing == f"opaque_{layout}"
    seen = aoconvert.inspect(elsewhere)
    assert seen.loads_here is False
    assert f"CPU layout {layout}" in str(seen.to_dict()["why_not"])
    with pytest.raises(VerificationError, match=f"CPU layout {layout}"):
        aoconvert.load(elsewhere)
    assert f"CPU layout {layout}" in str(obstacle(elsewhere))
    aoconvert.repack(elsewhere, "cpu", output=tmp_path / "here")
    assert contents(tmp_path / "here") == contents(int4("cpu"))
    assert aoconvert.inspect(int4("cpu")).loads_here is True
    assert obstacle(int4("cpu")) is None


@pytest.mark.exhaustive
def test_another_machine_reads_and_packs_as_this_one_expects(int4: Any, tmp_path: Path) -> None:
    """PyTorch without vector instructions, as any machine can run it, in a process that has packed nothing before."""
    code = """
import sys, aoconvert
cpu, cuda, out = sys.argv[1:]
aoconvert.repack(cpu, "cuda", output=out + "/cuda")
aoconvert.repack(cuda, "cpu", output=out + "/cpu")
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, int4("cpu"), int4("cuda"), tmp_path], env=environment, check=True)
    assert contents(tmp_path / "cuda") == contents(int4("cuda"))
    assert manifests.load(tmp_path / "cpu").components[0].layout.packing == "opaque_pairs32"
    aoconvert.repack(tmp_path / "cpu", "cuda", output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(int4("cuda"))


def obstacle(folder: Path) -> str | None:
    """What verify says of running it here."""
    return choose_load_device(from_manifest(folder, manifests.load(folder)), "auto").obstacle
