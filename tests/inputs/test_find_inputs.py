"""Inputs are found for models of many kinds, on ``meta`` and on the CPU, and the model takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny

from aoconvert.inputs import NoInputs, find_inputs, first_tensors, sqnr_db

_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2}


def _clip() -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=_TEXT, vision_config=_VISION))


def _encoder_decoder() -> Any:
    parts = [transformers.BertConfig(**_TEXT), transformers.BertConfig(**_TEXT)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    return transformers.EncoderDecoderModel(config)


def _video() -> Any:
    return transformers.VivitModel(transformers.VivitConfig(**_VISION, num_frames=2, tubelet_size=[2, 4, 4]))


def _sound() -> Any:
    return transformers.ASTModel(
        transformers.ASTConfig(**{**_VISION, "patch_size": 16}, max_length=32, num_mel_bins=16, frequency_stride=10)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "text and image": _clip,
    "encoder and decoder": _encoder_decoder,
    "video": _video,
    "sound": _sound,
    "image denoiser, patches": tiny.flux_transformer,
    "image denoiser": tiny.pixart_transformer,
    "video denoiser": tiny.wan_transformer,
    "autoencoder": tiny.image_vae,
}


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, "meta") for name in MODELS] + [(name, "cpu") for name in ("text and image", "sound", "video denoiser")],
)
def test_the_model_takes_what_was_found(name: str, device: str) -> None:
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[name]().eval().to(torch.bfloat16)
    found = find_inputs(model)
    again = find_inputs(model)
    with torch.no_grad():
        output = first_tensors(model(**found.make(device)))
    assert output
    assert all(tensor.is_meta or tensor.isfinite().all() for tensor in output)
    assert (found.proof, found.finite) == (("shapes", None) if device == "meta" else ("values", True))
    assert repr(again.state) == repr(found.state)


def test_a_model_that_takes_nothing_says_what_it_wants() -> None:
    class Stubborn(transformers.BertModel):
        def forward(self, input_ids: torch.Tensor) -> Any:
            raise ValueError("closed on Sundays")

    with pytest.raises(NoInputs, match="closed on Sundays"):
        find_inputs(Stubborn(transformers.BertConfig(**_TEXT)), tries=5)


def test_the_sqnr_of_outputs() -> None:
    signal = torch.full((4,), 10.0)
    assert sqnr_db([signal], [signal + 1]) == pytest.approx(20.0)
    assert sqnr_db([signal], [signal]) == float("inf")
    assert sqnr_db([signal], [signal[:2]]) is None
