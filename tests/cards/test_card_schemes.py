"""Cards of checkpoints with several schemes, packed layouts, experts, embeddings and fused projections."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reading import Page, read

import aoconvert
from aoconvert.cards import CardOptions, render
from aoconvert.cards import schemes as card_schemes
from aoconvert.checkpoint import manifest as manifests
from aoconvert.schemes import int4
from aoconvert.schemes.table import INT4

RECIPE = """
default = "int8wo"
rule = [
  { match = 're:.*\\.q_proj', scheme = "mxfp6_e2m3" },
  { match = 're:.*\\.up_proj', scheme = "float8wo" },
  { match = "model.layers.0.mlp.down_proj", scheme = "intx4wo", group_size = 32 },
]
"""


def build(folder: Path) -> None:
    """A tied Llama with rows of zeros."""
    import torch
    import transformers
    from helpers import tiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.llama(folder / "plain")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "plain")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3:6] = 0
    model.save_pretrained(folder / "source")


@pytest.fixture(scope="session")
def made(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Results by name, once a session. Read only."""
    done: dict[str, Path] = {}

    def several(folder: Path) -> tuple[Path, str | None, dict[str, Any]]:
        build(folder)
        (folder / "recipe.toml").write_text(RECIPE)
        return (
            folder / "source",
            None,
            {
                "recipe": folder / "recipe.toml",
                "include_embeddings": True,
                "default_skips": False,
            },
        )

    def untied(folder: Path) -> tuple[Path, str | None, dict[str, Any]]:
        return checkpoints("llama-tied"), "int8wo", {"include_embeddings": True, "untie": True}

    def packed(folder: Path) -> tuple[Path, str | None, dict[str, Any]]:
        return checkpoints("bert"), "int4wo", {"layout_device": folder.name.partition("-")[0], "group_size": 32}

    def experts(folder: Path) -> tuple[Path, str | None, dict[str, Any]]:
        return checkpoints("mixtral"), "int8wo", {}

    def fused(folder: Path) -> tuple[Path, str | None, dict[str, Any]]:
        parts = {"transformer": "int8wo", "text_encoder_2": "float8dq"}
        return checkpoints("flux"), "int8wo", {"components": parts, "fuse_qkv": True}

    sources = {"several": several, "untied": untied, "cuda": packed, "cpu": packed, "experts": experts, "fused": fused}

    def get(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp(f"{name}-")
            source, scheme, options = sources[name](folder)
            aoconvert.quantize(source, scheme, output=folder / "out", device="cpu", min_quantized=0, **options)
            done[name] = folder / "out"
        return done[name]

    return get


def card(folder: Path) -> Page:
    return read(render(folder, CardOptions()).text)


def cells(page: Page, first: str) -> list[str]:
    """The row of a table whose first cell is ``first``."""
    lines = [line for line in page.body.splitlines() if line.startswith(f"| {first} |")]
    assert lines, first
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_several_schemes(made: Callable[[str], Path]) -> None:
    folder = made("several")
    page = card(folder)
    [entry] = manifests.load(folder).components
    assert {"int8wo", "mxfp6_e2m3", "float8wo", "intx4wo", "torchao", "aoconvert"} <= set(page.front["tags"])
    assert not any("+" in tag for tag in page.front["tags"])
    for scheme in entry.scheme.split("+"):
        members = [tensor for tensor in entry.tensors if tensor.scheme == scheme]
        row = cells(page, f"`{scheme}`")
        assert row[1] == str(len(members))
        parameters = sum(tensor.shape[0] * tensor.shape[1] for tensor in members)
        assert float(row[3]) == pytest.approx(sum(tensor.bytes_out for tensor in members) / parameters, abs=5e-4)
    assert "intx4wo, a scale for each 32 values" in cells(page, "`model.layers.0.mlp.down_proj`")[1]
    assert "float8wo, a scale for each row" in page.shown
    assert "zeros: " in page.shown and "3 such rows were given a valid scale" in page.shown
    assert cells(page, "weights of linear layers")[1] == "14"
    assert "zeros in the input" not in page.shown
    assert "any device" in page.shown


def test_a_card_imports_no_library(made: Callable[[str], Path]) -> None:
    """Not for an example of a pipeline either, nor for rules of several schemes."""
    code = (
        "import sys; from pathlib import Path; from aoconvert import cards\n"
        "for name in sys.argv[1:]: print(len(cards.render(Path(name), cards.CardOptions(), repo_id='a/b').text))\n"
        "print({'torch', 'torchao', 'diffusers', 'transformers', 'accelerate', 'numpy'} & set(sys.modules))"
    )
    folders = [str(made(name)) for name in ("several", "fused")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_rules_are_those_of_the_config(made: Callable[[str], Path]) -> None:
    [entry] = manifests.load(made("several")).components
    rules = card_schemes.rules(entry)
    assert [rule["pattern"] for rule in rules] == list(entry.config["_data"]["fqn_to_config"])
    assert {rule["scheme"].partition(",")[0] for rule in rules} == set(entry.scheme.split("+"))
    [plain] = manifests.load(made("cuda")).components
    assert card_schemes.rules(plain) == []


def test_embeddings(made: Callable[[str], Path]) -> None:
    [entry] = manifests.load(made("several")).components
    page = card(made("several"))
    assert cells(page, "embedding tables")[1:] == ["1", "2.05 k", "int8", "quantized"]
    assert "embedding tables are quantized too, with the output head that is tied to them" in page.shown
    assert any(tensor.action == "tied" for tensor in entry.tensors)
    assert "embedding tables are quantized too." in card(made("untied")).shown
    assert "embedding tables" not in card(made("experts")).shown


def test_a_card_says_that_it_was_untied(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("untied"), tmp_path / "out"))
    values = json.loads((folder / "aoconvert.json").read_text())
    values["run"]["command"] = "aoconvert quantize source --scheme int8wo --untie"
    (folder / "aoconvert.json").write_text(manifests.dump(manifests.Manifest.model_validate(values)))
    page = card(folder)
    assert "the output head was tied to the embedding table in the source" in page.shown
    assert "aoconvert quantize ./source --scheme int8wo --untie\n" in page.fences("bash")
    assert "ties: " not in card(made("several")).shown


def test_int4_for_cuda_on_a_machine_without_it(made: Callable[[str], Path]) -> None:
    page = card(made("cuda"))
    assert "cuda only, compute capability 8.0 or higher (tile_packed_to_4d layout)" in page.shown
    assert "device = 'cuda'\n" in page.fences("python")[0]
    unconfirmed = INT4["cuda"].unconfirmed
    assert unconfirmed is None or f"layout: unconfirmed: {unconfirmed}" in page.shown
    assert "a scale for each 32 values" in page.shown


def test_int4_for_one_kind_of_cpu(made: Callable[[str], Path]) -> None:
    page = card(made("cpu"))
    assert f"vector instructions of the CPU, here {int4.machine_layout()};" in page.shown
    assert "device = 'cpu'\n" in page.fences("python")[0]
    assert "unconfirmed" not in page.shown


def test_experts(made: Callable[[str], Path]) -> None:
    page = card(made("experts"))
    assert cells(page, "stacked experts")[1] == "4"
    assert cells(page, "weights of linear layers")[1] == "8"
    assert "experts_implementation: eager" in page.shown
    assert "stacked experts" not in card(made("several")).shown


def test_fused_projections_and_two_components(made: Callable[[str], Path]) -> None:
    page = card(made("fused"))
    assert {"int8wo", "float8dq"} <= set(page.front["tags"])
    load = page.fences("python")[0]
    assert load.index("transformer.fuse_qkv_projections()") < load.index("transformer.load_state_dict")
    assert "text_encoder_2.fuse" not in load
    assert "fused: query, key and value projections are one layer each" in page.shown
    assert "a CUDA device needs compute capability 8.9 or higher" in page.shown
    assert "torch.cuda.get_device_capability() >= (8, 9)" in load
    assert "activations too, at run time" in page.shown
    assert "a whole input of zeros" in page.shown


def test_no_forward_pass_is_claimed(made: Callable[[str], Path], tmp_path: Path) -> None:
    """What verify writes on a machine without the device; here of its real report, the passes taken back."""
    folder = Path(shutil.copytree(made("cuda"), tmp_path / "out"))
    from aoconvert.checkpoint.checkpoint import from_manifest
    from aoconvert.checkpoint.files import file_sha256
    from aoconvert.checkpoint.load_code import code_sha256
    from aoconvert.checkpoint.report import Check, Report

    why = "its layout is for cuda, and this device is not available here"
    target = from_manifest(folder, manifests.load(folder))
    report = Report(
        schema_version=1,
        ok=True,
        path="out",
        checks=(
            Check(name="versions", status="skipped", detail=why, seconds=0.0),
            Check(name="reload", status="passed", detail="in place", seconds=0.0),
            Check(name="forward", status="skipped", detail=why, seconds=0.0),
        ),
        strategy="from-pretrained",
        safe_globals=target.safe_globals,
        imports=target.imports,
        torchao=None,
        torch=None,
        python=None,
        versions={},
        manifest_sha256=file_sha256(folder / "aoconvert.json"),
        date="2026-11-21T12:00:00+00:00",
        device="cpu",
        code_sha256=code_sha256(target, "from-pretrained"),
        example=False,
        ran=(),
        forward=(),
        published=None,
    )
    (folder / "aoconvert.verify.json").write_text(report.dump())
    page = card(folder)
    assert "Verified on 2026-11-21: aoconvert verify ran this code with device = 'cpu' in a fresh process" in page.shown
    assert "model.to('cuda') was not run." in page.shown
    assert "forward pass succeeded" not in page.shown
    assert f"No forward pass was run: {why}. Device cpu" in page.shown


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}, "64 values"),
        ({"_type": "MXDynamicActivationMXWeightConfig", "_data": {"block_size": 32}}, "32 values"),
        ({"_type": "NVFP4WeightOnlyConfig", "_data": {}}, "16 values"),
        ({"_type": "X", "_data": {"granularity": [{"_type": "PerRow"}, {"_type": "PerTensor"}]}}, "tensor"),
        (
            {"_type": "X", "_data": {"granularity": {"_type": "PerBlock", "_data": {"block_size": [128, 128]}}}},
            "block of 128 × 128",
        ),
        ({"_type": "X", "_data": {"granularity": {"_type": "PerGroup", "_data": {"group_size": 32}}}}, "32 values"),
        ({"_type": "X", "_data": [1]}, None),
        ({}, None),
    ],
)
def test_granularity(config: dict[str, Any], expected: str | None) -> None:
    assert card_schemes.granularity(config) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"re:(a+)+": {"_type": "Evil", "_data": {}}, "b": None}}},
        {"_type": "FqnToConfig", "_data": {"fqn_to_config": {"a|`b`": {"_type": "<script>"}, "c": [1]}}},
        {"_type": "FqnToConfig", "_data": 3},
        {"_type": ["x"]},
    ],
)
def test_rules_that_nobody_wrote(config: dict[str, Any], made: Callable[[str], Path], tmp_path: Path) -> None:
    """A manifest by somebody else: shown as it is, none of it becomes markup."""
    folder = Path(shutil.copytree(made("several"), tmp_path / "out"))
    values = json.loads((folder / "aoconvert.json").read_text())
    values["components"][0]["config"] = config
    (folder / "aoconvert.json").write_text(manifests.dump(manifests.Manifest.model_validate(values)))
    page = card(folder)
    assert "<script>" not in page.html
    assert "int8wo" in page.shown
