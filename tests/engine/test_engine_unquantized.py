"""Parts of a pipeline that are not quantized: the source's bits, in one kind of file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines import pipeline_loading_utils as diffusers_rules
from helpers import tiny
from safetensors.torch import load_file

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.checkpoint.manifest import Manifest
from aoconvert.verification.loading import Loaded, check_load
from aoconvert.verification.process import Children

PARTS = ("text_encoder", "vae")


@pytest.fixture(scope="module")
def source(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PixArt with its VAE in shards, and its T5 in a torch file where two names share one storage."""
    folder = tmp_path_factory.mktemp("unquantized") / "pixart"
    shutil.copytree(checkpoints("pixart"), folder)
    vae = tiny.diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.bfloat16)
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(folder / "vae", max_shard_size="100KB")
    text_encoder = tiny.transformers.T5EncoderModel.from_pretrained(folder / "text_encoder")
    state = text_encoder.state_dict()
    names = ("shared.weight", "encoder.embed_tokens.weight")
    assert len({state[name].data_ptr() for name in names}) == 1
    state["scale"], state["flags"] = torch.tensor(2.5), torch.tensor([True, False])
    state["none"] = torch.empty(0, 3)
    state["turned"] = torch.arange(6.0).reshape(2, 3).t()
    torch.save(state, folder / "text_encoder/pytorch_model.bin")
    (folder / "text_encoder/model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def result(source: Path) -> Path:
    aoconvert.quantize(source, "int8wo", output=source.parent / "out", device="cpu")
    return source.parent / "out"


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a part, straight from its files."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        state |= torch.load(path, weights_only=True, mmap=True)
    return state


def test_every_bit_of_every_tensor(source: Path, result: Path) -> None:
    for part in PARTS:
        before, after = state_of(source / part), state_of(result / part)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
            assert torch.equal(tensor, after[name]), name
    assert sorted(path.name for path in (result / "vae").iterdir()) == ["config.json", "diffusion_pytorch_model.bin"]


def test_what_shares_its_memory_is_written_once(source: Path, result: Path) -> None:
    state = torch.load(result / "text_encoder/pytorch_model.bin", weights_only=True)
    shared, twin = (state[name] for name in ("shared.weight", "encoder.embed_tokens.weight"))
    assert shared.data_ptr() == twin.data_ptr()
    sizes = [(folder / "text_encoder/pytorch_model.bin").stat().st_size for folder in (source, result)]
    assert sizes[1] <= sizes[0]


def test_the_manifest_names_every_tensor(source: Path, result: Path) -> None:
    written = manifests.load(result)
    assert [(part.name, part.class_name, part.library) for part in written.unquantized] == [
        ("text_encoder", "T5EncoderModel", "transformers"),
        ("vae", "AutoencoderKL", "diffusers"),
    ]
    read = {file.path for file in written.source.files}
    assert {path.relative_to(source).as_posix() for path in source.glob("vae/*.safetensors")} < read
    for part in written.unquantized:
        assert [file.path for file in part.files] == sorted({tensor.file for tensor in part.tensors})
        assert {tensor.name for tensor in part.tensors} == state_of(source / part.name).keys()


def test_torch_files_in_shards(source: Path, tmp_path: Path) -> None:
    """transformers' parts are cut like its models; a second name stays in the file of the first."""
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", max_shard_size="20KB")
    folder = tmp_path / "out/text_encoder"
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert index["shared.weight"] == index["encoder.embed_tokens.weight"]
    before, after = state_of(source / "text_encoder"), state_of(folder)
    assert before.keys() == after.keys() == index.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(list((tmp_path / "out/vae").glob("*.bin"))) == 1
    tiny.transformers.T5EncoderModel.from_pretrained(folder)


class Canary:
    def __reduce__(self) -> Any:
        return os.mkdir, ("canary",)


def test_a_foreign_pickle_is_not_taken_over(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, tmp_path / "source")
    torch.save({"a": torch.ones(2), "b": Canary()}, tmp_path / "source/text_encoder/pytorch_model.bin")
    for keep in (False, True):
        with pytest.raises(aoconvert.AoconvertError, match="mkdir"):
            aoconvert.quantize("source", "int8wo", device="cpu", keep_original_files=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_verify_looks_into_them(result: Path, tmp_path: Path) -> None:
    """A tensor that is not the one that was read, in a file whose digest was mended."""
    folder = tmp_path / "out"
    shutil.copytree(result, folder)
    path = folder / "vae/diffusion_pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    name = next(iter(state))
    state[name] = state[name] + 1
    torch.save(state, path)
    with Children() as children:
        status, detail = check_load(from_manifest(folder, manifests.load(folder)), Loaded(), children)
    assert (status, f"vae: {name}: its sha256 is" in detail) == ("failed", True)


def downloaded(names: set[str], model_index: Mapping[str, Any]) -> set[str]:
    """The weights files that diffusers fetches from a repo of these files, by its own functions."""
    _, folders = diffusers_rules._get_custom_components_and_folders("user/repo", dict(model_index), list(names))
    weights = diffusers_rules.filter_model_files(names)
    with_weights = {name.rpartition("/")[0] for name in weights} & set(folders)
    ignored = diffusers_rules._get_ignore_patterns([], with_weights, list(names), True, True, None, False, False)
    found, _ = diffusers_rules.variant_compatible_siblings(names, ignore_patterns=ignored)
    return {name for name in found if not any(name.endswith(pattern.lstrip("*")) for pattern in ignored)}


def weights_files(written: Manifest) -> set[str]:
    models = (*written.components, *written.unquantized)
    names = {file.path for model in models for file in model.files}
    return {name for name in names if not name.endswith("/config.json")}


FAMILIES = ["cogvideox", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("flux", "sd3", "wan"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hub_gives_exactly_the_weights(family: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    aoconvert.quantize(checkpoints(family), "int8wo", output=tmp_path / "out", device="cpu")
    check_download(tmp_path / "out")


def test_the_hub_gives_exactly_the_weights_of_shards(source: Path, result: Path, tmp_path: Path) -> None:
    check_download(result)
    options = {"components": ["transformer", "text_encoder"], "max_shard_size": "20KB", "min_quantized": 0.0}
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", **options)
    written = manifests.load(tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert downloaded(names, index) >= {name for name in weights_files(written) if name.startswith("text_encoder/")}


def check_download(folder: Path) -> None:
    written = manifests.load(folder)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    index = json.loads((folder / "model_index.json").read_text())
    assert downloaded(names, index) == weights_files(written)


def test_original_files_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    made = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", keep_original_files=True)
    assert not made.manifest.unquantized
    assert "--keep-original-files" in made.manifest.run.command
    for path in [*source.glob("vae/*"), *source.glob("text_encoder/*")]:
        assert (tmp_path / "out" / path.relative_to(source)).read_bytes() == path.read_bytes()
