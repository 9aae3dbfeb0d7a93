"""What aoconvert writes verifies clean, by both ways of loading; and so does a torchao checkpoint by somebody else."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny

import aoconvert

SCHEMES = ["int8wo", "int8dq", "float8wo", "float8wo_e5m2", "int4dq", *(f"intx{bits}wo" for bits in range(1, 9))]


# A verification takes seconds of imports. By default these run: seven schemes in one model with its source
# (test_verify_schemes), a pipeline that is assigned (below), those of the demo and the cards.
@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["from-pretrained", "assign"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(
    family: str, scheme: str, strategy: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints(family)
    aoconvert.quantize(source, scheme, output=tmp_path / "out", device="cpu", min_quantized=0)
    report = aoconvert.verify(tmp_path / "out", strategy=strategy, source=str(source))
    assert report.ok, report.to_dict()
    assert {check.status for check in report.checks} == {"passed"}, report.to_dict()
    assert report.strategy == strategy
    [forward] = report.forward
    assert forward.status == "passed"
    assert forward.output_sqnr_db is not None
    assert json.loads((tmp_path / "out/aoconvert.verify.json").read_text())["forward"] == report.to_dict()["forward"]


@pytest.mark.exhaustive
def test_by_somebody_else(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers' own .bin: no manifest, so nothing to compare with; the rest is proven."""
    from diffusers import FluxTransformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    model = FluxTransformer2DModel.from_pretrained(
        checkpoints("flux"),
        subfolder="transformer",
        torch_dtype=torch.bfloat16,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )
    model.save_pretrained(tmp_path / "out", safe_serialization=False)
    torch.save({"arguments": pathlib.PurePosixPath("x")}, tmp_path / "out/training_args.bin")  # loaded by nobody
    report = aoconvert.verify(tmp_path / "out")
    assert report.ok, report.to_dict()
    statuses = {check.name: check.status for check in report.checks}
    assert statuses["manifest"] == statuses["files"] == statuses["versions"] == "skipped"
    assert statuses["pickle"] == statuses["load"] == statuses["reload"] == statuses["forward"] == "passed"
    assert not (tmp_path / "out/aoconvert.verify.json").exists()


def test_fallback_where_from_pretrained_cannot(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """A sharded .bin beside safetensors (diffusers#14811): assigning to an empty model works; the report says so."""
    options: dict[str, Any] = {"max_shard_size": "1MB", "keep_original_files": True}
    aoconvert.quantize(checkpoints("cogvideox"), "int8wo", output=tmp_path / "out", device="cpu", **options)
    report = aoconvert.verify(tmp_path / "out")
    assert report.ok, report.to_dict()
    assert report.strategy == "assign"
    reload = report.check("reload")
    assert reload is not None
    assert "from_pretrained could not: " in reload.detail
    pipe = aoconvert.load(tmp_path / "out")
    assert type(pipe.transformer.proj_out.weight.data).__name__ == "Int8Tensor"
    assert tiny.cogvideox_step(pipe).isfinite().all()


@pytest.mark.parametrize("family", ["wan", pytest.param("flux", marks=pytest.mark.exhaustive)])
def test_a_pipeline_holds_the_model_that_was_assigned(
    family: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Wan's transformer is optional in its class: given to DiffusionPipeline, diffusers 0.42 loads another one."""
    aoconvert.quantize(
        checkpoints(family), "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0, fuse_qkv=True
    )
    pipe = aoconvert.load(tmp_path / "out")
    names = {name.rpartition(".")[2] for name, _ in pipe.transformer.named_modules()}
    assert "to_qkv" in names
    assert not any(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert tiny.FAMILIES[family].step(pipe).isfinite().all()


@pytest.mark.parametrize("family", ["llama-tied", "sd3"])
def test_load(family: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    kind = tiny.FAMILIES[family]
    aoconvert.quantize(checkpoints(family), "float8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    opened = aoconvert.load(tmp_path / "out")
    part = getattr(opened, kind.component) if kind.component else opened
    kinds = {type(m.weight.data).__name__ for m in part.modules() if isinstance(m, torch.nn.Linear)}
    assert "Float8Tensor" in kinds
    with torch.no_grad():
        assert torch.equal(kind.step(opened), kind.step(tiny.open_result(kind, tmp_path / "out")))


def test_the_numbers_of_another_source(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=tmp_path / "out", device="cpu")
    other = tmp_path / "other"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        tiny.llama(other)
    report = aoconvert.verify(tmp_path / "out", reload=False, source=str(other))
    numbers = report.check("numbers")
    assert numbers is not None
    assert numbers.status == "failed"
    assert "is not the source's tensor" in numbers.detail or "dB to the source" in numbers.detail


@pytest.mark.exhaustive  # test_forward_pass has such a model by default
def test_a_forward_pass_that_overflows(tmp_path: Path) -> None:
    """It loads, every hash fits, and its output is infinite: only the forward pass shows it."""
    source = tmp_path / "source"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.llama(source, tied=False)
    model = tiny.transformers.LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38).mul_(20)
    model.save_pretrained(source)
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    report = aoconvert.verify(tmp_path / "out")
    assert {check.name for check in report.checks if check.status == "failed"} == {"forward"}
    assert not report.ok


def test_json(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """The keys of the contract, and the exit codes."""
    from click.testing import CliRunner

    from aoconvert.cli.main import cli

    aoconvert.quantize(checkpoints("opt"), "int8wo", output=tmp_path / "out", device="cpu")
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--no-reload", "--json"], standalone_mode=False)
    values = json.loads(done.stdout)
    assert done.return_value == 0
    assert {"ok", "path", "checks", "strategy", "safe_globals", "imports", "torchao", "torch", "python"} <= set(values)
    assert [check["name"] for check in values["checks"]] == [
        "manifest", "files", "pickle", "versions", "load", "reload", "library", "numbers", "forward",
    ]  # fmt: skip
    (tmp_path / "out/config.json").write_text("{}")
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--no-reload", "-q"], standalone_mode=False)
    assert done.return_value == 4
    assert done.stdout == "failed\n"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["passed", "example skipped"], "passed"),
        (["passed", "example passed"], "passed"),
        (["passed", "example failed"], "failed"),
        (["skipped", "example passed"], "skipped"),
        (["example skipped"], "skipped"),
        (["failed", "example passed"], "failed"),
    ],
)
def test_an_example_that_was_not_run_takes_nothing_back(answers: list[str], expected: str) -> None:
    from aoconvert.verification.loading import Loaded, check_forward

    loaded = Loaded()
    for answer in answers:
        result = {"forward": {"status": answer.split()[-1], "detail": answer}}
        loaded.forward.append({**result, "example": True} if "example" in answer else result)
    assert check_forward(loaded, asked=True)[0] == expected
