"""A single file in its authors' names becomes what its diffusers folder becomes, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub.fixtures import HubClient
from helpers.authors_names import MODELS
from safetensors.torch import save_file

import aoconvert
from aoconvert.errors import SourceError, UsageError
from aoconvert.planning import Plan

FAMILIES = [name for name in MODELS if name != "flux"]


def build(folder: Path, name: str, extra: Mapping[str, torch.Tensor] | None = None) -> tuple[Path, Path]:
    """The model's folder as diffusers saves it, and the single file."""
    make, rename = MODELS[name]
    torch.manual_seed(0)
    model = make().bfloat16() if name != "wan" else make()
    model.save_pretrained(folder / "diffusers")
    state = {key: tensor.clone() for key, tensor in rename(model.state_dict()).items()}
    save_file({**state, **(extra or {})}, folder / "original.safetensors")
    return folder / "diffusers", folder / "original.safetensors"


def hashes(output: Path) -> dict[str, Any]:
    manifest = json.loads((output / "aoconvert.json").read_text())
    [component] = manifest["components"]
    return {file["path"]: file["sha256"] for file in component["files"]}


def convert(source: Path, output: Path, **options: Any) -> Any:
    return aoconvert.quantize(source, "int8wo", output=output, min_quantized=0, device="cpu", **options)


def check_same(folder: Path, name: str) -> None:
    diffusers_folder, file = build(folder, name)
    convert(diffusers_folder, folder / "from-folder")
    convert(file, folder / "from-file", config=str(diffusers_folder))
    assert hashes(folder / "from-file") == hashes(folder / "from-folder")


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_the_same_bytes_as_the_folder(tmp_path: Path, name: str) -> None:
    check_same(tmp_path, name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"sd3", "wan"}))
def test_the_same_bytes_as_the_folder_of_others(tmp_path: Path, name: str) -> None:
    check_same(tmp_path, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_are_those_that_diffusers_opens(tmp_path: Path, name: str) -> None:
    folder, file = build(tmp_path, name)
    made = MODELS[name][0]()
    ours = type(made).from_pretrained(folder, torch_dtype="auto").state_dict()
    theirs = type(made).from_single_file(str(file), config=str(folder), torch_dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(ours[key].bfloat16(), theirs[key].bfloat16()) for key in ours)


def test_a_bundle_gives_the_model_and_names_the_rest(tmp_path: Path) -> None:
    others = {"first_stage_model.encoder.conv_in.weight": torch.ones(2), "conditioner.embedders.0.x": torch.ones(3)}
    folder, file = build(tmp_path, "sdxl", others)
    result = convert(file, tmp_path / "out", config=folder)
    [component] = result.manifest.components
    assert {item.name for item in component.dropped} == set(others)
    assert all("leaves it out" in item.reason for item in component.dropped)
    assert any(min(others) in warning for warning in plan(file, config=folder).warnings)


@pytest.mark.parametrize("suffix", ["ckpt", "pt"])
def test_a_torch_file(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import load_file

    folder, file = build(tmp_path, "sd3")
    torch.save({"state_dict": load_file(file), "global_step": 3}, tmp_path / f"original.{suffix}")
    convert(folder, tmp_path / "from-folder")
    convert(tmp_path / f"original.{suffix}", tmp_path / "from-file", config=folder)
    assert hashes(tmp_path / "from-file") == hashes(tmp_path / "from-folder")


def plan(file: Path, **options: Any) -> Plan:
    return aoconvert.plan(file, "int8wo", min_quantized=0, device="cpu", **options)


def test_the_manifest_and_the_command_say_where_the_config_came_from(tmp_path: Path) -> None:
    folder, file = build(tmp_path, "wan")
    result = convert(file, tmp_path / "out", config=folder)
    source = result.manifest.source
    assert source.kind == "file"
    assert [entry.path for entry in source.files] == ["original.safetensors"]
    assert source.config is not None
    assert not source.config.inferred
    assert "quantize original.safetensors --scheme int8wo --config diffusers" in result.manifest.run.command
    card = aoconvert.card(tmp_path / "out").text
    assert "--config diffusers" in card
    assert "- Base model: the file `original.safetensors`\n" in card
    assert "from the file that it was made from" in card


def test_verify_compares_with_the_file(tmp_path: Path) -> None:
    folder, file = build(tmp_path, "sd3")
    convert(file, tmp_path / "out", config=folder)

    def checks() -> dict[str, Any]:
        report = aoconvert.verify(tmp_path / "out", source=str(file), forward=False, reload=False)
        return {check.name: check for check in report.checks}

    same = checks()
    assert same["source"].status == same["numbers"].status == "passed"
    assert "tensors compared" in same["numbers"].detail
    other = {name: tensor + 1 for name, tensor in MODELS["sd3"][0]().bfloat16().state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in MODELS["sd3"][1](other).items()}, file)
    assert {name for name, check in checks().items() if check.status == "failed"} == {"source", "numbers"}


def test_a_pipeline_gives_the_config_of_its_denoiser(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    from safetensors.torch import load_file

    pipeline = checkpoints("sd3")
    state = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({k: t.clone() for k, t in MODELS["sd3"][1](state).items()}, tmp_path / "original.safetensors")
    convert(pipeline, tmp_path / "from-folder", component_only=True)
    convert(tmp_path / "original.safetensors", tmp_path / "from-file", config=pipeline)
    assert hashes(tmp_path / "from-file") == hashes(tmp_path / "from-folder")


def test_diffusers_own_names_need_no_conversion(tmp_path: Path) -> None:
    folder, _ = build(tmp_path, "sd3")
    file = folder / "diffusion_pytorch_model.safetensors"
    convert(file, tmp_path / "from-file", config=folder)
    convert(folder, tmp_path / "from-folder")
    assert hashes(tmp_path / "from-file") == hashes(tmp_path / "from-folder")


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    folder, file = build(tmp_path, "sd3")
    other, _ = build(tmp_path / "other", "wan")
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "unknown.safetensors")
    with pytest.raises(SourceError, match=r"unknown.safetensors: its tensors are in no layout that diffusers knows"):
        plan(tmp_path / "unknown.safetensors")
    for source, config in ((file, other), (tmp_path / "unknown.safetensors", folder)):
        with pytest.raises(SourceError, match=r"its tensors are not those of an? .* in a layout that diffusers knows"):
            convert(source, tmp_path / "out", config=config)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_a_config_is_for_a_single_file(tmp_path: Path) -> None:
    folder, file = build(tmp_path, "sd3")
    with pytest.raises(UsageError, match="--config is for a single weights file"):
        plan(folder, config=folder)
    with pytest.raises(UsageError, match="is a file, which has no revisions"):
        plan(file, config=folder, revision="main")
    with pytest.raises(SourceError, match="--fuse-qkv does not work with a single file"):
        plan(file, config=folder, fuse_qkv=True)


@pytest.mark.exhaustive
def test_the_config_that_diffusers_takes_comes_from_the_hub(tmp_path: Path, hub_client: HubClient) -> None:
    """A layout is known by its names and sizes; the repo is the one that diffusers has for it."""
    folder, file = build(tmp_path, "ltx")
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    repo = DIFFUSERS_DEFAULT_PIPELINE_PATHS["ltx-video"]["pretrained_model_name_or_path"]
    offline = hub_client.command("plan", str(file), "--scheme", "int8wo", "--min-quantized", "0", "--local-files-only")
    assert offline.returncode == 5
    assert f"for the layout ltx-video, diffusers takes its config from {repo}" in offline.stderr
    assert "--config FOLDER or REPO" in offline.stderr
    hub_client.hub.state.create_repo(repo)
    index = {"_class_name": "LTXPipeline", "transformer": ["diffusers", "LTXVideoTransformer3DModel"]}
    sha = hub_client.hub.state.commit(
        repo,
        {
            "model_index.json": json.dumps(index).encode(),
            "transformer/config.json": (folder / "config.json").read_bytes(),
        },
    )
    out = tmp_path / "out"
    done = hub_client.command("quantize", str(file), "--scheme", "int8wo", "--min-quantized", "0", "-o", str(out))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "aoconvert.json").read_text())
    assert manifest["source"]["config"] == {
        "repo_id": repo,
        "revision": sha,
        "folder": "transformer",
        "inferred": True,
    }
    assert f"--config {repo}@{sha}" in manifest["run"]["command"]
    assert manifest["source"]["base_model"] is None
    card = aoconvert.card(out).text
    assert f"the file `original.safetensors`, with the config of [{repo}](https://huggingface.co/{repo})" in card


_LIMITED = """
import sys
from pathlib import Path
import aoconvert
aoconvert.quantize(sys.argv[1], "int8wo", config=sys.argv[2], output=sys.argv[3], device="cpu")
status = Path("/proc/self/status").read_text()
print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
"""


@pytest.mark.exhaustive
def test_the_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """1 GB whose conversion only renames takes less than 900 MB."""
    import diffusers

    _, rename = MODELS["ltx"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = diffusers.LTXVideoTransformer3DModel(
            num_attention_heads=32, attention_head_dim=64, cross_attention_dim=2048, num_layers=8
        ).bfloat16()
    model.save_config(tmp_path / "config")
    file = tmp_path / "original.safetensors"
    save_file({name: tensor.clone() for name, tensor in rename(model.state_dict()).items()}, file)
    assert file.stat().st_size > 10**9
    del model
    command = [sys.executable, "-c", _LIMITED, str(file), str(tmp_path / "config"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 900 * 10**6


def test_inspect_names_the_command_for_a_file_beside_its_config(tmp_path: Path) -> None:
    folder, _ = build(tmp_path, "sd3")
    file = folder / "diffusion_pytorch_model.safetensors"
    found = aoconvert.inspect(file).to_dict()["next"]
    assert found == f"aoconvert quantize {file} --scheme int8wo --config {folder}"


class _Trainer:
    """What a training script may leave in a checkpoint; opened by pickle it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (open, (str(self.place), "w"))


def test_a_pickled_trainer_is_refused_and_not_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, file = build(tmp_path, "sd3")
    torch.save({"state_dict": load_file(file), "trainer": _Trainer(tmp_path / "made")}, tmp_path / "original.ckpt")
    with pytest.raises(SourceError, match=r"original.ckpt: data.pkl, byte \d+: \S*open is not a name"):
        convert(tmp_path / "original.ckpt", tmp_path / "out", config=folder)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "made").exists()
