"""Configs are read by the library's own classes, and what is written is read back the same, its quantization too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny

from aoconvert.engine.model_config import model_config
from aoconvert.models import Skeleton, build_skeleton, identify
from aoconvert.models.base import ModelPart
from aoconvert.sources import resolve

T: Any = tiny.transformers
_WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_QUANTIZATION = {"quant_method": "torchao", "modules_to_not_convert": ["nothing"]}


def _two(cls: str) -> Callable[[], Any]:
    """A model of text and another kind of input: each part has a config of its own."""
    kind = cls.removesuffix("Config")
    text = {"vocab_size": 64, "max_position_embeddings": 16}
    if kind == "Clap":
        audio = {"patch_embeds_hidden_size": 32, "depths": [1], "num_attention_heads": [4], "hidden_size": 32}
        return lambda: T.ClapConfig(text_config=_WIDTHS | text, audio_config=audio)
    vision = {"image_size": 16, "patch_size": 8}
    return lambda: getattr(T, cls)(text_config=_WIDTHS | text, vision_config=_WIDTHS | vision)


def _bark() -> Any:
    part = {"input_vocab_size": 64, "output_vocab_size": 64, "num_layers": 1, "num_heads": 4, "hidden_size": 32}
    return T.BarkConfig(semantic_config=part, coarse_acoustics_config=part, fine_acoustics_config=part)


def _encoder_decoder() -> Any:
    bert = T.BertConfig(**_WIDTHS, vocab_size=64)
    return T.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)


def _musicgen() -> Any:
    decoder = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 32}
    t5 = T.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    audio = T.EncodecConfig(num_filters=2, upsampling_ratios=[2, 2], codebook_size=16, codebook_dim=8, hidden_size=8)
    return T.MusicgenConfig(text_encoder=t5.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder)


# class → the config that lies beside its weights
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "Mamba2ForCausalLM": lambda: T.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=8, n_groups=1
    ),
    "BambaForCausalLM": lambda: T.BambaConfig(**_WIDTHS, **_MAMBA, vocab_size=64, num_key_value_heads=2),
    "FalconH1ForCausalLM": lambda: T.FalconH1Config(
        **_WIDTHS, **_MAMBA, vocab_size=64, num_key_value_heads=2, mamba_d_ssm=64
    ),
    "GraniteMoeHybridForCausalLM": lambda: T.GraniteMoeHybridConfig(
        **_WIDTHS, **_MAMBA, vocab_size=64, num_key_value_heads=2, layer_types=["mamba"]
    ),
    "CLIPTextModel": _two("CLIPConfig"),
    "CLIPTextModelWithProjection": _two("CLIPConfig"),
    "CLIPVisionModel": _two("CLIPConfig"),
    "SiglipTextModel": _two("SiglipConfig"),
    "SiglipVisionModel": _two("SiglipConfig"),
    "ClapTextModel": _two("ClapConfig"),
    "BlipVisionModel": _two("BlipConfig"),
    "BarkSemanticModel": _bark,
    "BarkFineModel": _bark,
    "EncoderDecoderModel": _encoder_decoder,
    "MusicgenForConditionalGeneration": _musicgen,
    "MusicgenForCausalLM": _musicgen,
    "GPT2LMHeadModel": lambda: T.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=16),
}
_WHOLE = ("CLIP", "Siglip", "Clap", "Blip", "Bark", "MusicgenForCausalLM")
PARTS = frozenset(name for name in CONFIGS if name.startswith(_WHOLE))


def beside(folder: Path, name: str) -> ModelPart:
    """A folder with the config, and the component that it describes."""
    config = CONFIGS[name]()
    config.architectures = [name]
    config.save_pretrained(folder)
    component = identify(resolve(str(folder))).component("")
    assert component is not None
    return component


def without_dtype(config: Any) -> dict[str, Any]:
    """What a config says, but for what a conversion changes."""

    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        changed = ("dtype", "quantization_config", "architectures")
        return {key: clean(item) for key, item in value.items() if key not in changed}

    found: dict[str, Any] = clean(config.to_dict())
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_the_library_reads_it_and_written_so_that_it_reads_it_again(
    name: str, tmp_path: Path
) -> None:
    component = beside(tmp_path / "source", name)
    skeleton = build_skeleton(component, torch.bfloat16)
    cls = getattr(T, name)
    original = cls.config_class.from_pretrained(tmp_path / "source")
    says = without_dtype(original)  # before a model is built: some classes change it
    with torch.device("meta"):
        assert {spec.name for spec in skeleton} == set(cls._from_config(original, dtype=torch.bfloat16).state_dict())

    (tmp_path / "out").mkdir()
    text = model_config("transformers", skeleton.component.config, _QUANTIZATION, "bfloat16")
    (tmp_path / "out" / "config.json").write_text(text)
    again = cls.config_class.from_pretrained(tmp_path / "out")
    assert without_dtype(again) == says
    assert again.quantization_config["quant_method"] == "torchao"
    written = identify(resolve(str(tmp_path / "out"))).component("")
    assert written is not None
    assert written.class_name == name


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - PARTS))
def test_a_config_of_its_own_is_not_rewritten(name: str, tmp_path: Path) -> None:
    component = beside(tmp_path, name)
    assert build_skeleton(component, torch.bfloat16).component.config == component.config


@pytest.mark.parametrize("infinity", [{"__float__": "Infinity"}, float("inf")])
def test_infinity_in_either_spelling(infinity: Any, tmp_path: Path) -> None:
    beside(tmp_path, "Mamba2ForCausalLM")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "time_step_limit": [0.0, infinity]}))
    component = identify(resolve(str(tmp_path))).component("")
    assert component is not None
    model: Any = build_skeleton(component, torch.bfloat16).model
    assert list(model.config.time_step_limit) == [0.0, float("inf")]


def _heads(name: str, config: Any) -> set[str]:
    values = {**json.loads(config.to_json_string()), "architectures": [name]}
    skeleton: Skeleton = build_skeleton(ModelPart("", "", "transformers", name, values), torch.bfloat16)
    return {spec.name for spec in skeleton if spec.hint == "output head" and spec.kind == "linear"}


@pytest.mark.parametrize(
    ("name", "config", "heads"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {"lm_head.weight"}),
        ("LlamaForSequenceClassification", "LlamaConfig", {"score.weight"}),
        ("Qwen2ForSequenceClassification", "Qwen2Config", {"score.weight"}),
        ("Qwen2ForTokenClassification", "Qwen2Config", {"score.weight"}),
        ("LlamaForQuestionAnswering", "LlamaConfig", {"qa_outputs.weight"}),
        ("BertForQuestionAnswering", "BertConfig", {"qa_outputs.weight"}),
        ("BertForSequenceClassification", "BertConfig", {"classifier.weight"}),
        ("BertModel", "BertConfig", set()),
        ("MistralModel", "MistralConfig", set()),
    ],
)
def test_layers_that_give_the_output_are_known(name: str, config: str, heads: set[str]) -> None:
    cls = getattr(T, config)
    extra = {} if cls is T.BertConfig else {"num_key_value_heads": 2}
    assert _heads(name, cls(**_WIDTHS, **extra, vocab_size=64)) == heads


def test_whatever_transformers_leaves_alone_is_left_alone() -> None:
    from transformers.quantizers.base import get_keys_to_not_convert

    for name, config in (("CLIPTextModelWithProjection", T.CLIPTextConfig), ("GPT2LMHeadModel", T.GPT2Config)):
        cls: Any = getattr(T, name)
        with torch.device("meta"):
            model = cls(config())
        linear = {key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        found = {key.removesuffix(".weight") for key in _heads(name, config())}
        assert linear & set(get_keys_to_not_convert(model)) <= found
