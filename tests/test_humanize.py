"""Words for people."""

from __future__ import annotations

import pytest

from aoconvert.humanize import duration, rounded, with_article


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


@pytest.mark.parametrize(
    ("value", "text"),
    [(6210.3, "6,210"), (9.376e-5, "0.0000938"), (0.25, "0.25"), (4.0, "4"), (0.0, "0"), (-1234567.0, "-1,230,000")],
)
def test_a_number_has_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert rounded(value) == text


def test_a_time_is_in_the_largest_unit_of_which_there_is_one() -> None:
    assert duration(2.345) == "2.35 s"
    assert duration(0.00516, 0.00447, 1.2) == "5.16 ms (4.47 to 1,200)"
    assert duration(0.0000001) == "0.1 µs"
