"""Plans of published models, from nothing but their config.json."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import build_sparse_llama, llama_shapes
from helpers.published import PUBLISHED

import aoconvert
from aoconvert.errors import PlanError


def plan(folder: Path, cwd: Path) -> tuple[dict[str, Any], float, str]:
    """The plan, the processor's seconds that it took (a busy machine does not stretch them), and stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "aoconvert", "plan", str(folder), "--scheme", "int8wo", "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout), seconds, done.stderr


@pytest.mark.exhaustive
def test_llama_405b(tmp_path: Path) -> None:
    config = json.loads((PUBLISHED / "meta-llama/Llama-3.1-405B" / "config.json").read_text())
    made, seconds, stderr = plan(PUBLISHED / "meta-llama/Llama-3.1-405B", tmp_path)
    assert seconds < 15
    component = made["components"][0]
    shapes = llama_shapes(config)
    assert {t["name"]: tuple(t["shape"]) for t in component["tensors"]} == shapes
    totals = component["totals"]
    # 2 embedding tables, a final norm, and 126 layers: attention, MLP, two norms
    hidden, inner = 16384, 53248
    layer = 2 * hidden**2 + 2 * hidden * 1024 + 3 * hidden * inner + 2 * hidden
    assert totals["parameters"] == 2 * 128256 * hidden + hidden + 126 * layer == 405_853_388_800
    expected = 0
    for tensor in component["tensors"]:
        rows, columns = (*tensor["shape"], 1)[:2]
        quantized = "_proj." in tensor["name"]
        assert tensor["action"] == ("quantize" if quantized else "keep"), tensor
        # int8wo: one byte a value; a float32 scale and an int8 zero point a row
        size = rows * columns + 5 * rows if quantized else 2 * rows * columns
        assert tensor["bytes_out"] == size, tensor
        expected += size
    reasons = {t["name"]: t["reason"] for t in component["tensors"]}
    assert reasons["lm_head.weight"] == "output head"
    assert reasons["model.embed_tokens.weight"] == "an embedding table"
    assert totals["bytes_out"] == expected
    assert totals["bytes_in"] == 2 * 405_853_388_800
    files = component["files"]
    payload = dict.fromkeys((item["path"] for item in files), 0)
    for tensor in component["tensors"]:
        payload[tensor["file"]] += tensor["bytes_out"]
    assert len(files) == len(payload) > 40
    for item in files:
        assert 0 < payload[item["path"]] <= 10 * 10**9
        assert 0 < item["size"] - payload[item["path"]] < 10**6
    assert made["needs"]["disk_bytes"] >= sum(item["size"] for item in files)
    if shutil.disk_usage(tmp_path).free < made["needs"]["disk_bytes"]:
        assert "410." in stderr
        assert "free" in stderr
        assert len(stderr.splitlines()) == 1
        assert any("GB" in line for line in made["warnings"])


def test_the_disk_here_does_not_matter_elsewhere(tmp_path: Path) -> None:
    config = json.loads((PUBLISHED / "meta-llama/Llama-3.1-405B/config.json").read_text())
    source = build_sparse_llama(tmp_path / "model", config)
    made = aoconvert.plan(source, "int8wo", device="cpu", output=tmp_path / "out", elsewhere=True)
    assert made.needs.disk_bytes > 410e9 and not made.warnings
    if shutil.disk_usage(tmp_path).free < 410e9:
        with pytest.raises(PlanError, match=r"410.* GB needed, .* free on that disk"):
            aoconvert.plan(source, "int8wo", device="cpu", output=tmp_path / "out")


def test_flux_dev(tmp_path: Path) -> None:
    made, seconds, stderr = plan(PUBLISHED / "black-forest-labs/FLUX.1-dev/transformer", tmp_path)
    assert seconds < 15
    assert stderr == ""
    component = made["components"][0]
    assert (component["class"], component["library"]) == ("FluxTransformer2DModel", "diffusers")
    totals = component["totals"]
    assert totals["parameters"] == 11_901_408_320
    matrices = [t for t in component["tensors"] if len(t["shape"]) == 2]
    assert {t["action"] for t in matrices} == {"quantize"}
    # 19 double blocks of 14 matrices, 38 single blocks of 6, and 10 around them
    assert len(matrices) == 19 * 14 + 38 * 6 + 10
    quantized = sum(t["shape"][0] * t["shape"][1] for t in matrices)
    scales = sum(5 * t["shape"][0] for t in matrices)
    assert totals["quantized_parameters"] == quantized
    assert totals["bytes_out"] == quantized + scales + 2 * (11_901_408_320 - quantized)
    assert [item["path"] for item in component["files"]] == ["diffusion_pytorch_model.bin"]
    assert 0 < component["files"][0]["size"] - totals["bytes_out"] < 10**6


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-405B", "black-forest-labs/FLUX.1-dev/transformer"])
def test_published_config_cannot_be_quantized_without_weights(name: str, tmp_path: Path) -> None:
    import aoconvert

    with pytest.raises(aoconvert.PlanError) as caught:
        aoconvert.quantize(PUBLISHED / name, "int8wo", output=tmp_path / "out", device="cpu")
    assert caught.value.exit_code == 3
    assert any(f"no weights in {Path(name).name}" in problem for problem in caught.value.problems)
    assert list(tmp_path.iterdir()) == []
