"""Old faults brought back one by one, in a result whose manifest fits: the check ``library`` names each."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from forging import edit, forge, rewrite
from helpers import tiny
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.sources import resolve
from aoconvert.verification import children
from aoconvert.verification.children import library_child
from aoconvert.verification.library import _request, compare_by_library, judge
from aoconvert.verification.process import Children

CHILDREN = Path(children.__file__).parent


def chat_model(folder: Path) -> None:
    """A Llama with a head of its own, a tokenizer, several chat templates, and settings for generation."""
    tiny.llama(folder, tied=False)
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "panda", "plays", "chess"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    transformers.GenerationConfig(max_new_tokens=7, eos_token_id=2).save_pretrained(folder)


def two_heads(folder: Path) -> None:
    """A T5 whose class ties what its file holds twice, with other values."""
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64, tie_word_embeddings=False
    )
    transformers.T5ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    add_tensors(folder, **{"lm_head.weight": torch.randn(64, 32).bfloat16()})


def with_prediction_layer(folder: Path) -> None:
    """Layers for multi-token prediction, which the class ignores and other loaders use."""
    config = transformers.Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=1,
    )
    transformers.Glm4MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    add_tensors(folder, **{"model.layers.2.eh_proj.weight": torch.randn(8, 8).bfloat16()})


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


def with_safety_checker(folder: Path) -> None:
    """Stable Diffusion in float32, with a part whose class is the pipeline's own."""
    import diffusers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    half = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    clip = transformers.CLIPConfig(
        text_config={**half, "vocab_size": 64, "projection_dim": 32},
        vision_config={**half, "image_size": 32, "patch_size": 8, "projection_dim": 32},
        projection_dim=32,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    diffusers.StableDiffusionPipeline(
        vae=tiny.image_vae(),
        text_encoder=tiny.clip_text("CLIPTextModel"),
        tokenizer=tiny.clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=StableDiffusionSafetyChecker(clip),
        feature_extractor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Built:
    """A source, and a result that was made of it."""

    source: Path
    result: Path


BUILDERS: dict[str, Callable[[Path], None]] = {
    "chat": chat_model,
    "tied": tiny.llama,
    "two heads": two_heads,
    "prediction": with_prediction_layer,
    "checked": with_safety_checker,
    "sd3": tiny.sd3_pipeline,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    made: dict[str, Built] = {}

    def get(name: str) -> Built:
        if name not in made:
            root = tmp_path_factory.mktemp("library")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                BUILDERS[name](root / "source")
            aoconvert.quantize(root / "source", "int8wo", output=root / "out", device="cpu", min_quantized=0)
            made[name] = Built(root / "source", root / "out")
        return made[name]

    return get


def ask_here(source: Path, result: Path, monkeypatch: pytest.MonkeyPatch, scratch: Path, **request: Any) -> Any:
    """What the check finds, by the child's own program in this process: a fresh one imports for seconds."""
    target = from_manifest(result, manifests.load(result))
    assert target.manifest is not None
    asked = _request(target, resolve(str(source)), target.manifest, str(scratch), trust=False) | request
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked)))
    monkeypatch.setattr(sys, "__stdout__", said)
    library_child.main()
    return judge("source", [json.loads(line) for line in said.getvalue().splitlines()])


def weights(folder: Path) -> Path:
    return next(folder.rglob("*pytorch_model.bin"))


def exchange(state: dict[str, Any], first: str, second: str) -> None:
    state[first], state[second] = state[second], state[first]


def permute(state: dict[str, Any], name: str) -> None:
    state[name] = state[name].flip(0).contiguous()


def in_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda out: rewrite(weights(out), change)


def tie(out: Path) -> None:
    """The head of the file is left out, and counts as tied."""
    rewrite(weights(out), lambda state: state.pop("lm_head.weight"))
    edit(out / "config.json", lambda values: values.update(tie_word_embeddings=True))


def call_tied(values: dict[str, Any]) -> None:
    [head] = [t for t in values["components"][0]["tensors"] if t["name"] == "lm_head.weight"]
    head |= {"action": "tied", "file": None, "sha256": None, "reason": "tied to model.embed_tokens.weight"}


def untie(out: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    rewrite(weights(out), change)
    edit(out / "config.json", lambda values: values.update(tie_word_embeddings=False))


def swap_words(out: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        exchange(values["model"]["vocab"], "panda", "chess")

    edit(out / "tokenizer.json", change)


def drop_part(out: Path) -> None:
    edit(out / "model_index.json", lambda values: values.update(safety_checker=[None, None]))
    shutil.rmtree(out / "safety_checker")


def drop_head(out: Path) -> None:
    """Of two heads in the file the second is left out, and counts as tied."""
    rewrite(weights(out), lambda state: state.pop("lm_head.weight"))
    edit(out / "config.json", lambda values: values.update(tie_word_embeddings=True))


def more_tensors(source: Path) -> None:
    """A tensor that the class does not know, in the source alone."""
    add_tensors(source, **{"model.layers.2.eh_proj.weight": torch.ones(4, 4, dtype=torch.bfloat16)})


def ignored_tensor(source: Path) -> None:
    """One that the library drops without a word, as it does old tables of frequencies."""
    add_tensors(source, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})


def dense_layer(source: Path) -> None:
    """As sentence-transformers has it."""
    (source / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense/model.safetensors")


def adapter(source: Path) -> None:
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    save_file({"lora": torch.ones(2)}, source / "adapter_model.safetensors")


def one_scale(state: dict[str, Any]) -> None:
    state["model.layers.0.mlp.up_proj.weight"].scale[0] *= 1.5


@dataclass(frozen=True)
class Fault:
    """What is done to a result (or to a copy of its source), and words of what the check says then."""

    family: str
    says: str
    result: Callable[[Path], Any] = lambda out: None
    source: Callable[[Path], Any] = lambda source: None
    manifest: Callable[[dict[str, Any]], Any] = field(default=lambda values: None)


def json_file(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda out: edit(out / name, lambda values: values.update(changes))


def remove(*names: str) -> Callable[[Path], None]:
    return lambda out: [shutil.rmtree(out / n) if (out / n).is_dir() else (out / n).unlink() for n in names] and None


FAULTS = {
    "a head that counts as tied": Fault("chat", "lm_head.weight", tie, manifest=call_tied),
    "a tie that is broken": Fault("tied", "lm_head.weight and model.embed_tokens.weight are one tensor", untie),
    "two tensors exchanged": Fault(
        "chat",
        "model.layers.0.mlp.up_proj.weight has an SQNR of",
        in_weights(lambda s: exchange(s, *(f"model.layers.0.mlp.{x}_proj.weight" for x in ("up", "gate")))),
    ),
    "a weight permuted": Fault(
        "chat", "model.embed_tokens.weight has other", in_weights(lambda s: permute(s, "model.embed_tokens.weight"))
    ),
    "one scale": Fault("chat", "up_proj.weight has an SQNR of", in_weights(one_scale)),
    "a model in another dtype": Fault(
        "chat", "is float32, but the library loads it as", json_file("config.json", dtype="float32")
    ),
    "a tensor made anew": Fault(
        "chat", "reports model.norm.weight as missing", in_weights(lambda s: s.pop("model.norm.weight"))
    ),
    "a tensor that was not quantized": Fault(
        "chat",
        "is not quantized, but the manifest says",
        in_weights(lambda s: s.update({k: v.dequantize() for k, v in s.items() if k.endswith("0.mlp.up_proj.weight")})),
    ),
    "a config": Fault("chat", "config.rms_norm_eps differs", json_file("config.json", rms_norm_eps=1e-3)),
    "other frequencies": Fault(
        "chat",
        "model.rotary_emb.inv_freq, which no file holds",
        json_file("config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ),
    "generation config": Fault("chat", "generation_config", remove("generation_config.json")),
    "a vocabulary": Fault("chat", "vocabulary differs from the source's", swap_words),
    "a special token": Fault("chat", "special tokens differ", json_file("tokenizer_config.json", eos_token="<s>")),
    "a chat template": Fault(
        "chat", "chat template differs", lambda out: (out / "chat_template.jinja").write_text("{{ 1 }}")
    ),
    "a tokenizer": Fault(
        "chat", "AutoTokenizer opens the source, but not", remove("tokenizer.json", "tokenizer_config.json")
    ),
    "more chat templates": Fault("chat", "chat template differs", remove("additional_chat_templates")),
    "one head of two": Fault("two heads", "lm_head.weight", drop_head, manifest=call_tied),
    "a layer for multi-token prediction": Fault(
        "prediction",
        "eh_proj.weight, which the class does not use, is in the source's files",
        in_weights(lambda s: s.pop("model.layers.2.eh_proj.weight")),
    ),
    "its values": Fault(
        "prediction", "eh_proj.weight has other", in_weights(lambda s: permute(s, "model.layers.2.eh_proj.weight"))
    ),
    "a tensor that the class does not know": Fault("chat", "eh_proj.weight", source=more_tensors),
    "a tensor that the library ignores": Fault("chat", "rotary_emb.inv_freq", source=ignored_tensor),
    "a file that nothing here opens": Fault(
        "chat", "the file 2_Dense/model.safetensors is in the source, but not in the result", source=dense_layer
    ),
    "another one": Fault(
        "chat", "the file generation_config.json differs", json_file("generation_config.json", note=1)
    ),
    "an adapter": Fault(
        "chat", "adapter only in the source" if find_spec("peft") is None else "base_layer", source=adapter
    ),
    "a part of the pipeline's own class": Fault("checked", "the part safety_checker is not there", drop_part),
    "a part that is not quantized": Fault(
        "checked",
        "vae: decoder.conv_in.weight has other values",
        lambda out: rewrite(
            out / "vae/diffusion_pytorch_model.bin", lambda state: permute(state, "decoder.conv_in.weight")
        ),
    ),
    "a scheduler": Fault(
        "checked", "scheduler.beta_end differs", json_file("scheduler/scheduler_config.json", beta_end=0.5)
    ),
    "a processor of images": Fault(
        "checked",
        "feature_extractor.do_resize differs",
        json_file("feature_extractor/preprocessor_config.json", do_resize=False),
    ),
    "a pipeline's class": Fault(
        "checked", "the pipeline is a", json_file("model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    ),
    "a setting of the pipeline": Fault(
        "checked", "requires_safety_checker differs", json_file("model_index.json", requires_safety_checker=False)
    ),
    "a buffer": Fault(
        "sd3",
        "transformer: pos_embed.pos_embed has other values",
        lambda out: rewrite(
            out / "transformer/diffusion_pytorch_model.bin", lambda s: s["pos_embed.pos_embed"].mul_(2)
        ),
    ),
}
# of the pipelines; a model alone takes less time
USUAL = {"a part of the pipeline's own class", "a part that is not quantized"}
PIPELINES = {"checked", "sd3"}


def brought_back(fault: Fault, made: Built, folder: Path) -> tuple[Path, Path]:
    """A copy of the source and of the result, with the fault in it."""
    source, out = folder / "source", folder / "out"
    shutil.copytree(made.source, source)
    shutil.copytree(made.result, out)
    fault.source(source)
    fault.result(out)
    forge(out, fault.manifest)
    return source, out


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if fault.family not in PIPELINES or name in USUAL else [pytest.mark.exhaustive])
        for name, fault in FAULTS.items()
    ],
)
def test_an_old_fault(
    name: str, built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    source, out = brought_back(fault, built(fault.family), tmp_path)
    found = ask_here(source, out, monkeypatch, tmp_path)
    assert found.status == "failed", found
    assert fault.says in found.detail, found.detail


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.exhaustive] if name == "sd3" else []) for name in BUILDERS]
)
def test_nothing_wrong(
    family: str, built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = built(family)
    found = ask_here(made.source, made.result, monkeypatch, tmp_path)
    assert (found.status, found.left) == ("passed", {}), found.detail


def test_children_import_nothing_of_ours() -> None:
    """They see what a user's machine would see: the libraries, and Python's own modules."""
    for path in CHILDREN.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] == "aoconvert"], path.name


def test_another_model(built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line: another class by its configs, other sizes and other values as the library opens them."""
    made = built("tied")
    target = from_manifest(made.result, manifests.load(made.result))
    found = compare_by_library(target, resolve(str(built("two heads").source)), Children(), trust=False)
    assert (found.status, found.detail) == (
        "failed", "source is another model: T5ForConditionalGeneration, not LlamaForCausalLM",
    )  # fmt: skip
    source = Path(shutil.copytree(made.source, tmp_path / "source"))
    torch.manual_seed(1234)
    tiny.llama(source)  # other random weights
    found = ask_here(source, made.result, monkeypatch, tmp_path)
    assert found.detail.startswith("source is another model: lm_head.weight has other values than the source")
    edit(source / "config.json", lambda values: values.update(hidden_size=64, head_dim=8))
    transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(source)).save_pretrained(source)
    found = ask_here(source, made.result, monkeypatch, tmp_path)
    assert found.detail.startswith("source is another model: ")


def test_what_is_opened_whole_needs_memory(
    checkpoints: Callable[[str], Path], built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that transformers merges are made in memory; what it only maps takes none."""
    made = built("chat")
    assert ask_here(made.source, made.result, monkeypatch, tmp_path, available=1000).status == "passed"
    aoconvert.quantize(checkpoints("mixtral"), "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    found = ask_here(checkpoints("mixtral"), tmp_path / "out", monkeypatch, tmp_path, available=1000)
    assert (found.status, found.left) == ("skipped", None)
    assert found.detail.startswith(
        "the library loads MixtralForCausalLM completely, which takes 0.0 GB of memory; 0.0 GB"
    )
    assert ask_here(checkpoints("mixtral"), tmp_path / "out", monkeypatch, tmp_path, available=10**9).status == "passed"


STATED: dict[str, dict[str, Any]] = {
    "untied": {"untie": True, "default_skips": False, "include_embeddings": True},
    "ties that are quantized": {"default_skips": False, "include_embeddings": True},
    "another dtype": {"dtype": "float16"},
    "the source's dtype": {"dtype": "auto"},
    "a layout for another device": {"scheme": "int4wo", "group_size": 32, "layout_device": "cuda"},
    "shards": {"max_shard_size": "12KB"},
}


@pytest.mark.parametrize("name", STATED)
def test_what_may_differ(
    name: str, built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences that are made on purpose, as the manifest states them."""
    options = {"scheme": "int8wo", "device": "cpu", "min_quantized": 0, **STATED[name]}
    source = built("tied").source
    aoconvert.quantize(source, **options, output=tmp_path / "out")
    found = ask_here(source, tmp_path / "out", monkeypatch, tmp_path)
    assert found.status == "passed", found
    assert found.left is not None
    assert len(found.left.get("", ())) == (14 if "layout_device" in options else 0)


def test_what_lies_beside_the_weights_is_data(tmp_path: Path) -> None:
    names = [
        "pytorch_model.bin",
        "voices.safetensors",
        "consolidated.safetensors",
        "training_args.bin",
        "own.safetensors",
    ]
    for name in names:
        (tmp_path / name).touch()
    find = library_child.opening.weights_files
    assert [path.name for path in find(tmp_path, None)] == ["pytorch_model.bin"]
    (tmp_path / "config.json").write_text('{"transformers_weights": "own.safetensors"}')
    assert [path.name for path in find(tmp_path, None)] == ["own.safetensors"]
    (tmp_path / "config.json").write_text('{"transformers_weights": "own.safetensors.index.json"}')
    (tmp_path / "own.safetensors.index.json").write_text('{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}')
    assert [path.name for path in find(tmp_path, None)] == ["1.safetensors", "2.safetensors"]


def test_a_tensor_without_values_is_named() -> None:
    """diffusers leaves what no file holds without values, and says nothing."""
    compare = library_child.tensors.compare_values
    here, gone = torch.ones(2), torch.ones(2, device="meta")
    assert (
        compare("a.weight", here, gone) == "a.weight has values only in the source: no file of the other model holds it"
    )
    assert (
        compare("a.weight", gone, here) == "a.weight has values only in the result: no file of the other model holds it"
    )
    assert compare("a.weight", gone, gone) is None


def test_an_old_name_is_not_ignored() -> None:
    """A class in it ignores ``decoder``, but the library renames these before."""
    text = {"model_type": "t5", "vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    audio = {"model_type": "encodec", "num_filters": 2, "hidden_size": 8, "codebook_size": 8, "codebook_dim": 8}
    decoder = {"model_type": "musicgen_decoder", "vocab_size": 8, "hidden_size": 8, "ffn_dim": 8}
    decoder |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_codebooks": 2}
    config = transformers.MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
    with torch.device("meta"):
        model = transformers.MusicgenForConditionalGeneration(config)
    old = "audio_encoder.decoder.layers.0.conv.weight_g"
    assert library_child.reports.find_ignored(model, {old, "text_encoder.decoder.x.weight"}) == {
        "text_encoder.decoder.x.weight"
    }


def test_files_that_settings_name(tmp_path: Path) -> None:
    """Where they are is no difference; what is in them is."""
    folders = tmp_path / "source", tmp_path / "result"
    for folder in folders:
        transformers.WhisperTokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]).save_pretrained(folder)
        (folder / "normalizer.json").write_text('{"colour": "color"}')
    compare = library_child.configs.compare_beside
    assert not list(compare(*folders, trust=False))
    (folders[1] / "normalizer.json").write_text("{}")
    assert all("other settings" in line for line in compare(*folders, trust=False))
    assert any(compare(*folders, trust=False))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("flux", {"fuse_qkv": True}),
        ("flux", {"component_only": True}),
        ("wan", {"fuse_qkv": True}),
        ("cogvideox", {"max_shard_size": "1MB"}),
        ("pixart", {"components": ["transformer", "text_encoder"]}),
        ("pixart", {"keep_original_files": True}),
    ],
)
@pytest.mark.exhaustive
def test_what_may_differ_in_a_pipeline(
    family: str,
    options: Any,
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = checkpoints(family), tmp_path / "out"
    aoconvert.quantize(source, "int8wo", output=out, device="cpu", min_quantized=0, **options)
    found = ask_here(source, out, monkeypatch, tmp_path)
    assert (found.status, found.left) == ("passed", {}), found.detail


@pytest.mark.parametrize("name", ["one scale", "generation config", "a vocabulary", "a part that is not quantized"])
@pytest.mark.exhaustive
def test_nothing_else_sees_it(name: str, built: Callable[[str], Built], tmp_path: Path) -> None:
    fault = FAULTS[name]
    source, out = brought_back(fault, built(fault.family), tmp_path)
    report = aoconvert.verify(out, source=str(source))
    assert {check.name for check in report.checks if check.status == "failed"} == {"library"}, report.to_dict()
    assert {check.name for check in report.checks if check.status == "skipped"} == set()


def llama_of(folder: Path, dtype: torch.dtype, layers: int) -> None:
    """A Llama with layers of 134 million elements."""
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    model.save_pretrained(folder)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("dtype", "layers"), [(torch.bfloat16, 14), (torch.float32, 6)])
def test_two_gigabytes_take_less_than_one_of_memory(dtype: torch.dtype, layers: int, tmp_path: Path) -> None:
    """What the interpreter has of its own (RssAnon): imports and pieces of tensors, whether or not weights are cast."""
    source, out = tmp_path / "source", tmp_path / "out"
    llama_of(source, dtype, layers)
    assert sum(path.stat().st_size for path in source.iterdir()) > 2e9
    aoconvert.quantize(source, "int8wo", output=out, device="cpu")
    peak, over = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.02):
            for process in psutil.Process().children():
                with contextlib.suppress(OSError, StopIteration):
                    peak = max(peak, own_bytes(process.pid))

    watcher = threading.Thread(target=sample)
    watcher.start()
    found = compare_by_library(from_manifest(out, manifests.load(out)), resolve(str(source)), Children(), trust=False)
    over.set()
    watcher.join()
    assert found.status == "passed", found
    assert 1e8 < peak < 1e9


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one of the above: what this process has of its own grows by far less than the weights."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")  # float32, to be cast
    assert (tmp_path / "source/model.safetensors").stat().st_size > 260e6
    aoconvert.quantize(tmp_path / "source", "int8wo", output=tmp_path / "out", device="cpu")
    before, peak, over = own_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, own_bytes())

    watcher = threading.Thread(target=sample)
    watcher.start()
    found = ask_here(tmp_path / "source", tmp_path / "out", monkeypatch, tmp_path)
    over.set()
    watcher.join()
    assert found.status == "passed", found
    assert peak - before < 90e6


def own_bytes(process: int | str = "self") -> int:
    """Memory of a process that no file backs."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def own_code(folder: Path) -> None:
    """A Llama whose classes are code beside the weights."""
    tiny.llama(folder)
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(
        folder / "config.json",
        lambda values: values.update(model_type="own", architectures=["OwnForCausalLM"], auto_map=names),
    )


def test_code_inside_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    own_code(source)
    aoconvert.quantize(source, "int8wo", output=out, device="cpu", min_quantized=0, trust_remote_code=True)
    assert ask_here(source, out, monkeypatch, tmp_path).status == "skipped"
    assert ask_here(source, out, monkeypatch, tmp_path, trust=True).status == "passed"
    in_weights(one_scale)(out)
    forge(out)
    assert ask_here(source, out, monkeypatch, tmp_path, trust=True).status == "failed"
