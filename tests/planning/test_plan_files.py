"""Which file holds which tensor, and which files are taken over."""

import json
from pathlib import Path

import pytest
from helpers.checkpoints import build_llama, shard
from hypothesis import given
from hypothesis import strategies as st

import aoconvert
from aoconvert.checkpoint import manifest
from aoconvert.planning.files import assign
from aoconvert.planning.types import TensorPlan


def tensor(name: str, size: int, action: str = "keep") -> TensorPlan:
    return TensorPlan(
        name=name,
        shape=(size,),
        dtype="bfloat16",
        source_dtype="bfloat16",
        action=action,  # type: ignore[arg-type]
        reason=None,
        candidate=False,
        parameter=True,
        embedding=False,
        bytes_in=size,
        bytes_out=size,
    )


@given(st.data())
def test_assign(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 100), st.booleans()), max_size=30))
    tensors = [tensor(f"t{n}", size, "tied" if tied else "keep") for n, (size, tied) in enumerate(sizes)]
    order = data.draw(st.permutations([item.name for item in tensors]))
    order = [*order[: data.draw(st.integers(0, len(order)))], "not a tensor"]
    limit = data.draw(st.integers(1, 150))
    dealt = assign(tensors, order, limit)
    written = [item.name for item in tensors if item.action != "tied"]
    flat = [name for names in dealt for name in names]
    assert sorted(flat) == sorted(written)
    known = [name for name in order if name in written]
    assert flat == known + [name for name in written if name not in known]
    size = {item.name: item.bytes_out for item in tensors}
    for names, following in zip(dealt, [*dealt[1:], []], strict=True):
        assert sum(size[name] for name in names) <= limit or len(names) == 1
        if following:  # no file ends before it is full
            assert names
            assert sum(size[name] for name in names) + size[following[0]] > limit


def test_assign_takes_a_mixture_of_experts() -> None:
    tensors = [tensor(f"layers.{n}.weight", 10) for n in range(60_000)]
    assert len(assign(tensors, [item.name for item in tensors[:30_000]], 10_000)) == 60


FOREIGN = ["pytorch_model.bin", "model.onnx", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "m-Q4_K_M.gguf"]
FOREIGN += ["onnx/model.onnx", "original/consolidated.00.pth", "model.safetensors.index.json", "model.fp16.safetensors"]
TAKEN = ["LICENSE", "NOTICE.txt", "USE_POLICY.md", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
TAKEN += ["special_tokens_map.json", "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json"]
TAKEN += ["sample.png"]


def test_copies_of_a_transformers_model(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    left = ["README.md", "modeling_llama.py", ".gitattributes", *FOREIGN]
    for path in [*TAKEN, *left]:
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_text("{}")
    made = aoconvert.plan(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert [item.path for item in made.copied] == sorted(TAKEN)
    assert [item.source for item in made.copied] == sorted(TAKEN)
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {*TAKEN, "config.json", "pytorch_model.bin", "aoconvert.json"}
    assert [item.path for item in result.manifest.copied] == sorted(TAKEN)


def test_remote_code_is_taken_only_when_it_is_trusted(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    (source / "modeling_llama.py").write_text("raise SystemExit")
    made = aoconvert.plan(source, "int8wo", output=tmp_path / "out", device="cpu", trust_remote_code=True)
    assert "modeling_llama.py" in [item.path for item in made.copied]


def test_sentence_transformers_folders_are_taken(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    modules += [{"idx": 3, "path": "../secret"}]
    (source / "modules.json").write_text(json.dumps(modules))
    for path in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "other/config.json"):
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("secret")
    made = aoconvert.plan(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert [item.path for item in made.copied] == [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "generation_config.json",
        "modules.json",
        "other/config.json",
    ]


@pytest.fixture
def variants(pipeline: Path, tmp_path: Path) -> Path:
    """The pipeline with everything in fp16 names except the VAE, and a text encoder in shards."""
    import shutil

    source = tmp_path / "variants"
    shutil.copytree(pipeline, source)
    folder = source / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    shard(source / "text_encoder", "model", 2, "fp16")
    (source / "README.md").write_text("# card")
    return source


def test_variant(variants: Path, tmp_path: Path) -> None:
    with pytest.raises(aoconvert.SourceError, match="only as variants: fp16"):
        aoconvert.plan(variants, "int8wo", output=tmp_path / "out", device="cpu")
    made = aoconvert.plan(variants, "int8wo", output=tmp_path / "out", device="cpu", variant="fp16")
    text_encoder, vae = made.unquantized
    at = "text_encoder/model.fp16-0000"
    assert text_encoder.weights.files == tuple(f"{at}{number}-of-00002.safetensors" for number in (1, 2))
    assert [file.path for file in text_encoder.files] == ["text_encoder/pytorch_model.bin"]
    # the VAE has no such variant and is taken as it is, like diffusers does
    assert vae.weights.files == ("vae/diffusion_pytorch_model.safetensors",)
    assert not [item.path for item in made.copied if "fp16" in item.path]


def test_original_files_lose_the_variant(variants: Path, tmp_path: Path) -> None:
    options = {"output": tmp_path / "out", "device": "cpu", "variant": "fp16", "keep_original_files": True}
    made = aoconvert.plan(variants, "int8wo", **options)
    assert not made.unquantized
    copied = {item.path: item.source for item in made.copied}
    at = "text_encoder/model"
    assert copied[f"{at}.safetensors.index.json"] == f"{at}.safetensors.index.fp16.json"
    assert copied[f"{at}-00001-of-00002.safetensors"] == f"{at}.fp16-00001-of-00002.safetensors"
    assert copied["vae/diffusion_pytorch_model.safetensors"] == "vae/diffusion_pytorch_model.safetensors"
    assert "README.md" not in copied
    assert not [path for path in copied if "fp16" in path]
    aoconvert.quantize(variants, "int8wo", **options)
    index = json.loads((tmp_path / "out" / "text_encoder" / "model.safetensors.index.json").read_text())
    for path in set(index["weight_map"].values()):
        assert (tmp_path / "out" / "text_encoder" / path).is_file()
    assert not list((tmp_path / "out").rglob("*fp16*"))
    for item in manifest.load(tmp_path / "out").copied:
        assert (tmp_path / "out" / item.path).stat().st_size == item.size


def test_variant_result_opens(variants: Path, tmp_path: Path) -> None:
    import torch

    aoconvert.quantize(variants, "int8wo", output=tmp_path / "out", device="cpu", variant="fp16")
    from diffusers import DiffusionPipeline

    opened = DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert type(opened.transformer.proj_out.weight).__name__ == "Int8Tensor"
    assert opened.text_encoder.dtype == torch.bfloat16


def test_absent_variant_is_refused(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(aoconvert.SourceError, match="has no variant 'fp16'") as caught:
        aoconvert.plan(pipeline, "int8wo", output=tmp_path / "out", device="cpu", variant="fp16")
    assert caught.value.hint == "omit --variant"
