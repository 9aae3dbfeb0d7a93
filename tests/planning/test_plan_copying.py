"""What is not weights arrives, whatever its name; what does not arrive is named with the reason."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoints import build_llama
from helpers.tiny import clip_tokenizer, t5_tokenizer, transformers

import aoconvert
from aoconvert.cards import CardOptions, render
from aoconvert.checkpoint import manifest as manifests
from aoconvert.options import QuantizeOptions
from aoconvert.planning.copying import sort_files
from aoconvert.sources.folder import FolderSource

CODE = "code; --trust-remote-code copies it"
HIDDEN, STATE, EXPORT = "hidden", "training state", "an export to another format"
ADAPTER = "part of an adapter that lacks its config or its weights; no library loads it"

TAKEN = [
    *("vocab.bpe", "dict.txt", "o200k.tiktoken", "tokenizer.model.v3", "source.spm", "spm.model", "notes.md"),
    *("additional_chat_templates/tool_use.jinja", "chat_template.json", "processor_config.json", "LICENSE.md"),
    *("assets/teaser.gif", "sample.wav", "speaker_embeddings/v2/a.npy", "speaker_embeddings/b.npz", "results.csv"),
    *("1_Pooling/config.json", "preprocessor/deep/er/config.json", "params.json", "LICENSE", "model_card.pdf"),
]
LEFT = {
    "README.md": "the result has its own model card",
    "sqnr.svg": "the result has its own",
    ".gitattributes": HIDDEN,
    ".eval_results/a.yaml": HIDDEN,
    "assets/.DS_Store": HIDDEN,
    "__pycache__/modeling.cpython-311.pyc": "a cache, or an unfinished download",
    "model.safetensors.incomplete": "a cache, or an unfinished download",
    "modeling_llama.py": CODE,
    "pytorch_model.bin": "other weights",
    "model.fp16.safetensors": "weights of the variant fp16",
    "model.safetensors.index.fp16.json": "an index of weights that are not copied",
    "consolidated.00.pth": "other weights",
    "model-Q4_K_M.gguf": "other weights",
    "tf_model.h5": "other weights",
    "flax_model.msgpack": "other weights",
    "rust_model.ot": "other weights",
    "model.npz": "other weights",
    "original/consolidated.00.pth": "original/ holds weights that do not belong to this model",
    "original/tokenizer.model": "original/ holds weights that do not belong to this model",
    "onnx/config.json": EXPORT,
    "onnx/model.onnx": EXPORT,
    "openvino/openvino_model.xml": EXPORT,
    "coreml/text.mlpackage/Manifest.json": EXPORT,
    "optimizer.pt": STATE,
    "rng_state_0.pth": STATE,
    "scheduler.pt": STATE,
    "training_args.bin": STATE,
    "trainer_state.json": STATE,
    "checkpoint-500/config.json": STATE,
    "runs/Nov30/events.out.tfevents.1": STATE,
    "global_step10/mp_rank_00_model_states.pt": STATE,
    "adapter_config.json": ADAPTER,
    "lora/adapter_config.json": ADAPTER,
    "lora/adapter_model.safetensors": ADAPTER,
}


def touch(folder: Path, paths: list[str]) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")


def test_every_file_arrives_or_is_named(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    touch(source, [*TAKEN, *LEFT])
    (source / ".git").mkdir()
    (source / "assets" / ".cache").mkdir()
    written = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu").manifest
    here = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert here == {*TAKEN, "generation_config.json", "config.json", "pytorch_model.bin", "aoconvert.json"}
    # of hidden folders only the names are known
    hidden = {".eval_results": HIDDEN, ".git": HIDDEN, "assets/.cache": HIDDEN}
    expected = {path: reason for path, reason in LEFT.items() if not path.startswith(".eval")} | hidden
    assert {entry.path: entry.reason for entry in written.left_behind} == expected
    made = aoconvert.plan(source, "int8wo", output=tmp_path / "other", device="cpu").to_dict()
    assert {entry["path"]: entry["reason"] for entry in made["left_behind"]} == expected
    card = render(tmp_path / "out", CardOptions()).text
    assert "| not copied | `.eval_results` | 1 | hidden |" in card


NAMES = re.compile(
    r"^\s*(?:VOCAB_FILES_NAMES|vocab_files_names|[A-Z_]+_FILE|[A-Z_]+_NAME)\b[^=\n]*= *(\{.*?\}|.*?$)", re.M | re.S
)


def test_every_name_that_a_tokenizer_or_processor_reads(tmp_path: Path) -> None:
    """Out of transformers' own source: also of classes whose packages are not installed."""
    [root] = importlib.util.find_spec("transformers").submodule_search_locations  # type: ignore[union-attr]
    modules = [*Path(root).glob("models/*/tokenization_*.py"), *Path(root).glob("tokenization_*.py")]
    texts = [path.read_text() for path in (*modules, *Path(root).glob("*process*.py"), Path(root, "utils/__init__.py"))]
    values = [value for text in texts for value in NAMES.findall(text)]
    found = {name for value in values for name in re.findall(r'"([\w.-]+\.\w+)"', value)}
    found -= {name for name in found if re.search(r"\.(bin|h5|msgpack|safetensors)", name)}  # names of weights
    assert found >= {"bpe.codes", "source.spm", "dict.txt", "spiece.model", "tokenizer.json", "normalizer.json"}
    touch(tmp_path, [*found, "config.json"])
    source = FolderSource(tmp_path)
    layout = aoconvert.models.ModelLayout("transformers", "", "X", ())
    copied, left = sort_files(source, layout, (), (), QuantizeOptions("int8wo"))
    assert {item.path for item in copied} >= found
    assert not left


def vocabulary(folder: Path, special: str = "<s> <pad> </s> <unk> [UNK] [PAD] [CLS] [SEP] [MASK]") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return [*special.split(), *"abcdefghijklmnopqrstuvwxyz", "panda", "plays"]


def bert(folder: Path) -> None:
    words = vocabulary(folder)
    transformers.BertTokenizer(vocab={word: at for at, word in enumerate(words)}).save_pretrained(folder)


def phobert(folder: Path) -> None:
    words = vocabulary(folder)
    (folder / "dict").write_text("".join(f"{word} 1\n" for word in words[9:]))
    (folder / "codes").write_text("p a 1\npa n</w> 1\n")
    transformers.PhobertTokenizer(str(folder / "dict"), str(folder / "codes")).save_pretrained(folder)


def roc_bert(folder: Path) -> None:
    words = vocabulary(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    for name in ("word_shape.json", "word_pronunciation.json"):
        (folder / name).write_text(json.dumps({word: at for at, word in enumerate(words)}))
    files = [str(folder / name) for name in ("vocab.txt", "word_shape.json", "word_pronunciation.json")]
    transformers.RoCBertTokenizer(*files).save_pretrained(folder)


def prophetnet(folder: Path) -> None:
    (folder / "x").parent.mkdir(parents=True, exist_ok=True)
    (folder / "x").write_text("\n".join(vocabulary(folder)))
    transformers.ProphetNetTokenizer(str(folder / "x")).save_pretrained(folder)
    (folder / "x").unlink()


def esm(folder: Path) -> None:
    words = vocabulary(folder, "<cls> <pad> <eos> <unk> <mask>")
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def ctc(folder: Path) -> None:
    words = vocabulary(folder)
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)


def templates(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("additional_chat_templates/*.jinja"))) == 2


def byt5(folder: Path) -> None:
    transformers.ByT5Tokenizer().save_pretrained(folder)


def clip(folder: Path) -> None:
    image = transformers.CLIPImageProcessor(size=32, crop_size=32)
    transformers.CLIPProcessor(image, clip_tokenizer()).save_pretrained(folder)


def speech(folder: Path) -> None:
    ctc(folder)
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder)
    transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)


def bark(folder: Path) -> None:
    bert(folder)
    voices = {"repo_or_path": str(folder)}
    names = ("semantic_prompt", "coarse_prompt", "fine_prompt")
    voice = {name: np.arange(8).reshape((8,) if at == 0 else (2, 4)) for at, name in enumerate(names)}
    processor = transformers.BarkProcessor(transformers.AutoTokenizer.from_pretrained(folder), {"me": voice, **voices})
    (folder / "speaker_embeddings").mkdir()
    for name, values in voice.items():
        np.save(folder / f"speaker_embeddings/me_{name}.npy", values)
    paths = {name: f"speaker_embeddings/me_{name}.npy" for name in names}
    (folder / "speaker_embeddings_path.json").write_text(json.dumps({**voices, "me": paths}))
    processor.tokenizer.save_pretrained(folder)


def same_tokenizers(before: Any, after: Any) -> None:
    assert type(before) is type(after)
    assert before.get_vocab() == after.get_vocab()
    assert before.special_tokens_map == after.special_tokens_map
    assert before.chat_template == after.chat_template
    assert before("a panda plays")["input_ids"] == after("a panda plays")["input_ids"]


TOKENIZERS: list[Callable[[Path], None]] = [
    bert,
    phobert,
    roc_bert,
    prophetnet,
    esm,
    ctc,
    templates,
    byt5,
    clip,
    speech,
]
TOKENIZERS += [
    lambda folder: t5_tokenizer().save_pretrained(folder),
    lambda folder: clip_tokenizer().save_pretrained(folder),
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with the files of many tokenizers and processors, each in a folder; and the result."""
    root = tmp_path_factory.mktemp("zoo")
    source = build_llama(root / "model")
    for number, build in enumerate(TOKENIZERS):
        build(source / str(number))
    bark(source / "bark")
    aoconvert.quantize(source, "int8wo", output=root / "out", device="cpu")
    assert not manifests.load(root / "out").left_behind
    return source, root / "out"


@pytest.mark.parametrize("number", range(len(TOKENIZERS)))
def test_tokenizers_are_equal(number: int, zoo: tuple[Path, Path]) -> None:
    same_tokenizers(*(transformers.AutoTokenizer.from_pretrained(folder / str(number)) for folder in zoo))


@pytest.mark.parametrize("build", [clip, speech])
def test_processors_are_equal(build: Callable[[Path], None], zoo: tuple[Path, Path]) -> None:
    number = str(TOKENIZERS.index(build))
    before, after = (transformers.AutoProcessor.from_pretrained(folder / number) for folder in zoo)
    assert type(before) is type(after)
    assert before.to_dict() == after.to_dict()
    same_tokenizers(before.tokenizer, after.tokenizer)
    if build is clip:
        image = [transformers.AutoImageProcessor.from_pretrained(folder / number).to_dict() for folder in zoo]
        assert image[0] == image[1]


def test_voices_are_data(zoo: tuple[Path, Path]) -> None:
    """Bark's processor reads arrays beside it."""
    before, after = (transformers.BarkProcessor.from_pretrained(folder / "bark") for folder in zoo)
    one, other = (processor._load_voice_preset("me") for processor in (before, after))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_sentence_transformers_modules(tmp_path: Path) -> None:
    """Their weights are taken over; a second copy in another format, or a pickle that must not be loaded, is not."""
    import torch
    from safetensors.torch import save_file

    source = build_llama(tmp_path / "model")
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}, {"path": "3_More"}]))
    for name in ("2_Dense", "3_More"):
        touch(source, [f"{name}/config.json"])
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense/model.safetensors")
    torch.save({"linear.weight": torch.ones(2, 2)}, source / "3_More/pytorch_model.bin")
    out = tmp_path / "out"
    aoconvert.quantize(source, "int8wo", output=out, device="cpu")
    for path in ("2_Dense/model.safetensors", "3_More/pytorch_model.bin", "3_More/config.json"):
        assert (out / path).read_bytes() == (source / path).read_bytes()
    touch(source, ["3_More/model.onnx", "3_More/model.pkl"])
    left = aoconvert.plan(source, "int8wo", output=tmp_path / "other", device="cpu").left_behind
    assert [item.path for item in left] == ["3_More/model.onnx", "3_More/model.pkl"]
    (source / "3_More/pytorch_model.bin").write_bytes(b"cposix\nsystem\n.")
    with pytest.raises(aoconvert.PlanError, match=r"3_More/pytorch_model\.bin"):
        aoconvert.quantize(source, "int8wo", output=tmp_path / "other", device="cpu")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_comes_as_a_whole(name: str, tmp_path: Path) -> None:
    """Config and weights, as transformers looks for them; half of one, or a second copy, is named."""
    import torch
    from safetensors.torch import save_file

    source = build_llama(tmp_path / "model")
    weights = {"base_model.model.lora_A.weight": torch.ones(2, 2)}
    save_file(weights, source / name) if name.endswith("safetensors") else torch.save(weights, source / name)
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')
    made = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    for path in ("adapter_config.json", name):
        assert (tmp_path / "out" / path).read_bytes() == (source / path).read_bytes()
    assert any("names as its base" in line for line in made.warnings)
    (source / "adapter_config.json").unlink()
    left = aoconvert.plan(source, "int8wo", output=tmp_path / "other", device="cpu").left_behind
    assert [(item.path, item.reason) for item in left] == [(name, ADAPTER)]


def test_one_component_alone(pipeline: Path, tmp_path: Path) -> None:
    """Of the pipeline around it the licence arrives, and the rest is named."""
    import shutil

    source = tmp_path / "source"
    shutil.copytree(pipeline, source)
    touch(source, ["LICENSE.md", "README.md"])
    made = aoconvert.plan(source, "int8wo", output=tmp_path / "out", device="cpu", component_only=True)
    assert [(item.source, item.path) for item in made.copied] == [("LICENSE.md", "LICENSE.md")]
    here = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    left = {item.path for item in made.left_behind}
    assert left == {path for path in here if not path.startswith("transformer/")} - {"LICENSE.md"}
    assert {item.reason for item in made.left_behind} == {"belongs to the pipeline around the component"}
