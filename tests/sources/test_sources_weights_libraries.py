"""find_weights against the libraries themselves: what they write is found, and what they prefer is preferred."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aoconvert.formats.safetensors.header import header_of
from aoconvert.sources import weights
from aoconvert.sources.folder import FolderSource
from aoconvert.sources.weights import WeightFiles, find_weights


def diffusers_model(seed: int) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=4, out_channels=4, text_embed_dim=8,
        time_embed_dim=4, sample_width=4, sample_height=4, sample_frames=1, patch_size=2, max_text_seq_length=4,
    )  # fmt: skip


def transformers_model(seed: int) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    return BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    )


def names(found: WeightFiles | None, source: FolderSource) -> set[str]:
    """Tensor names, from the index and from the files, which must agree."""
    assert found is not None
    held = {name: path for path in found.files for name in header_of(source, path).entries}
    if found.index is not None:
        assert found.index == held
    return set(held)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_what_they_save_is_found(
    tmp_path: Path, library: weights.Library, variant: str | None, shard_size: str
) -> None:
    model = diffusers_model(0) if library == "diffusers" else transformers_model(0)
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size)
    source = FolderSource(tmp_path)
    found = find_weights(source, "", library, variant=variant)
    assert names(found, source) == set(model.state_dict())
    assert found is not None
    assert (len(found.files) > 1) == (shard_size == "8KB")


@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
def test_diffusers_bin(tmp_path: Path, shard_size: str) -> None:
    model = diffusers_model(0)
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=shard_size)
    found = find_weights(FolderSource(tmp_path), "", "diffusers")
    assert found is not None
    assert found.format == "bin"
    assert {n for file in found.files for n in torch.load(tmp_path / file)} == set(model.state_dict())


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_single_file_or_index_as_they_prefer(tmp_path: Path, library: weights.Library) -> None:
    """A folder with both, holding different values: what from_pretrained loads is what find_weights says."""
    make = diffusers_model if library == "diffusers" else transformers_model
    for seed, shard_size, folder in [(1, "1GB", "single"), (2, "8KB", "sharded")]:
        make(seed).save_pretrained(tmp_path / folder, max_shard_size=shard_size)
    for file in (tmp_path / "single").iterdir():
        file.rename(tmp_path / "sharded" / file.name)
    source = FolderSource(tmp_path / "sharded")
    found = find_weights(source, "", library)
    assert found is not None
    loaded = type(make(0)).from_pretrained(tmp_path / "sharded").state_dict()
    expected = make(1 if found.index is None else 2).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_names_are_theirs() -> None:
    from diffusers.utils import constants
    from diffusers.utils.hub_utils import _add_variant as diffusers_variant
    from transformers import modeling_utils

    transformers_variant = modeling_utils._add_variant
    for single, index, library, add in [
        (constants.SAFETENSORS_WEIGHTS_NAME, constants.SAFE_WEIGHTS_INDEX_NAME, "diffusers", diffusers_variant),
        (constants.WEIGHTS_NAME, constants.WEIGHTS_INDEX_NAME, "diffusers", diffusers_variant),
        (
            modeling_utils.SAFE_WEIGHTS_NAME,
            modeling_utils.SAFE_WEIGHTS_INDEX_NAME,
            "transformers",
            transformers_variant,
        ),
        (modeling_utils.WEIGHTS_NAME, modeling_utils.WEIGHTS_INDEX_NAME, "transformers", transformers_variant),
    ]:
        format_ = single.rpartition(".")[2]
        stem = weights.STEMS[library][format_]
        for variant in (None, "fp16"):
            assert f"{weights._with_variant(stem, variant)}.{format_}" == add(single, variant)
            assert weights._index_names(f"{stem}.{format_}", library, variant)[0] == add(index, variant)


def test_legacy_index_of_diffusers(tmp_path: Path) -> None:
    """The old name of a variant's index, which diffusers still reads."""
    model = diffusers_model(3)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="8KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    content = json.loads(index.read_text())
    legacy = {}
    for name, shard in content["weight_map"].items():
        legacy[name] = shard.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors")
        if (tmp_path / shard).exists():
            (tmp_path / shard).rename(tmp_path / legacy[name])
    index.unlink()
    content["weight_map"] = legacy
    (tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps(content))
    source = FolderSource(tmp_path)
    assert names(find_weights(source, "", "diffusers", variant="fp16"), source) == set(model.state_dict())
    loaded = type(model).from_pretrained(tmp_path, variant="fp16").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
