"""Words for people."""

from __future__ import annotations

import pytest

from aoconvert.humanize import with_article


@pytest.mark.parametrize(
    "text",
    [
        *("a BertModel", "an OPTForCausalLM", "an AutoencoderKL", "an Int8Tensor", "a FluxTransformer2DModel"),
        *("an SD3Transformer2DModel", "an LTXPipeline", "a T5EncoderModel", "a UNet2DConditionModel", "an NVFP4Tensor"),
        *("a model", "an original", "a LlamaForCausalLM", "an MT5Model", "a CLIPTextModel"),
    ],
)
def test_the_article_is_the_one_that_is_spoken(text: str) -> None:
    assert with_article(text.split(" ")[1]) == text
