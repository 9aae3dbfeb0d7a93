"""What the libraries make for a model is tried first: by a pipeline's call, a processor, ``dummy_inputs``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from helpers import tiny
from torch.nn.modules import module as all_modules

from aoconvert.inputs import find_inputs, first_tensors, from_libraries, from_pipeline, processor_folders
from aoconvert.inputs.trial import TookTooLong, TookTooMuch, attempt

_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2}


@pytest.fixture(scope="module")
def pipe(checkpoints: Callable[[str], Path]) -> Any:
    found = diffusers.FluxPipeline.from_pretrained(checkpoints("flux"), torch_dtype=torch.bfloat16)
    found.set_progress_bar_config(disable=True)
    return found


def test_a_pipeline_hands_its_parts_their_inputs(pipe: Any) -> None:
    names = ("text_encoder", "text_encoder_2", "transformer")
    parts = {name: getattr(pipe, name) for name in names}
    handed = from_pipeline(pipe, parts)
    assert set(handed) == set(names)
    for name, part in parts.items():
        found = find_inputs(part, [handed[name], *from_libraries(part)])
        assert (found.source, found.proof, found.finite) == ("pipeline", "values", True), name
        assert not part._forward_pre_hooks
    arguments = find_inputs(pipe.transformer, [handed["transformer"]]).make()
    with torch.no_grad():
        prompt = pipe.encode_prompt("A red panda reads a book", None)[0]
    assert torch.equal(arguments["encoder_hidden_states"], prompt)
    assert not all_modules._global_forward_pre_hooks


def test_what_a_pipeline_does_not_call_gets_its_inputs_otherwise(pipe: Any) -> None:
    parts = {"transformer": pipe.transformer, "vae": pipe.vae}  # only the decoder of a VAE is called
    handed = from_pipeline(pipe, parts)
    assert set(handed) == {"transformer"}
    assert find_inputs(pipe.vae, from_libraries(pipe.vae)).source == "search"


def test_a_pipelines_call_has_a_limit(pipe: Any) -> None:
    assert from_pipeline(pipe, {"transformer": pipe.transformer}, seconds=0) == {}
    assert not all_modules._global_forward_pre_hooks


def test_a_processor_beside_the_model(tmp_path: Path) -> None:
    tokenizer = tiny.clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    transformers.CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path)
    text = {**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=_VISION)).eval()
    found = find_inputs(model, from_libraries(model, processor_folders(tmp_path)))
    assert (found.source, found.proof) == ("processor", "values")
    arguments = found.make()
    assert arguments["pixel_values"].shape == (1, 3, 16, 16)
    assert arguments["input_ids"].tolist() == [tokenizer("A red panda reads a book")["input_ids"]]


def test_the_tokenizer_of_a_part_lies_in_a_folder_of_its_own(checkpoints: Callable[[str], Path]) -> None:
    flux = checkpoints("flux")
    assert processor_folders(flux / "text_encoder_2") == (flux / "tokenizer_2",)
    assert processor_folders(flux / "transformer") == ()


def test_what_a_class_offers_itself() -> None:
    model = transformers.T5Model(transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1)).eval()
    found = find_inputs(model, from_libraries(model))
    assert found.source == "dummy_inputs"
    names = {"input_ids", "decoder_input_ids", "decoder_attention_mask"}
    arguments = found.make()
    assert set(arguments) == names
    assert {tuple(value.shape) for value in arguments.values()} == {(1, 5)}


def test_what_a_class_offers_and_does_not_take_is_passed_over() -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**_VISION)).eval()  # token ids, by its base class
    found = find_inputs(model, from_libraries(model))
    assert (found.source, set(found.state)) == ("search", {"pixel_values"})


def _hidream() -> Any:
    """A list of text states, one for each layer of a text encoder, in a tensor."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4}
    widths = {"caption_channels": [32, 16], "text_emb_dim": 64, "axes_dims_rope": [4, 2, 2]}
    rest = {"patch_size": 2, "in_channels": 4, "max_resolution": [32, 32], "llama_layers": [0, 1]}
    return diffusers.HiDreamImageTransformer2DModel(**sizes, **widths, **rest)


def _ace_step() -> Any:
    """Its docstring has the sizes that go together."""
    sizes = {"hidden_size": 32, "text_hidden_dim": 32, "timbre_hidden_dim": 32, "intermediate_size": 32, "head_dim": 8}
    layers = {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1}
    return diffusers.AceStepConditionEncoder(num_attention_heads=4, num_key_value_heads=2, **sizes, **layers)


def _siglip2() -> Any:
    """Patches of an image, and how many there are each way."""
    vision = {name: value for name, value in _VISION.items() if name != "image_size"} | {"num_patches": 16}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=_TEXT, vision_config=vision))


def _lumina() -> Any:
    """A rotary embedding of complex numbers, and a dict of options that is wanted though it may be empty."""
    sizes = {"sample_size": 16, "hidden_size": 24, "num_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1}
    return diffusers.LuminaNextDiT2DModel(multiple_of=16, cross_attention_dim=32, **sizes)


@pytest.mark.parametrize("build", [_hidream, _ace_step, _siglip2, _lumina])
def test_inputs_of_more_kinds(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    found = find_inputs(model, from_libraries(model))
    with torch.no_grad():
        output = first_tensors(model(**found.make()))
    assert output
    assert all(bool(tensor.isfinite().all()) for tensor in output)


def test_a_pass_that_takes_too_long_is_ended() -> None:
    model = transformers.BertModel(transformers.BertConfig(**_TEXT)).eval()
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert attempt(model, inputs).error is None
    assert isinstance(attempt(model, inputs, until=time.thread_time()).error, TookTooLong)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_pass_that_would_take_too_much_memory_is_ended(implementation: str) -> None:
    """The scores of so long a text would be 2 GB."""
    config = transformers.BertConfig(**_TEXT, max_position_embeddings=1 << 14, attn_implementation=implementation)
    model = transformers.BertModel(config).eval()
    outcome = attempt(model, {"input_ids": torch.ones(1, 1 << 14, dtype=torch.long)})
    assert isinstance(outcome.error, TookTooMuch)
