"""The picture: plain SVG that any page can show."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from aoconvert.cards.layers import KINDS, Layer, kind_of, patterns
from aoconvert.cards.picture import draw
from aoconvert.checkpoint.manifest import TensorEntry


def layer(place: int, sqnr: float | None, kind: str = "attention") -> Layer:
    tensor = TensorEntry(
        name="x", shape=[2, 2], dtype="bfloat16", action="quantize", class_name="c", bytes_in=8, bytes_out=4
    )
    return Layer(place, f"blocks.{place}.x", kind, sqnr, tensor)


def of_outputs(svg: str) -> list[float]:
    """Where the diamonds are, from the top; the first is the legend's."""
    return [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)l", svg)]


def check(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        assert name in ("svg", "title", "style", "rect", "path", "text"), name
        for key, value in element.attrib.items():
            assert "href" not in key and not key.startswith("on") and "url(" not in value
    assert "@import" not in svg and svg.count("http") == 1  # the namespace
    return root


@pytest.mark.parametrize("count", [2, 37, 1000, 20_000])
def test_it_parses_and_stays_small(count: int) -> None:
    layers = [layer(place, 20 + place % 17 / 3, KINDS[place % 5]) for place in range(count)]
    for outputs in (False, True):
        shown = [replace(item, output=item.sqnr and item.sqnr + 1) for item in layers] if outputs else layers
        svg = draw([("", shown)])
        assert svg is not None
        check(svg)
        assert len(svg) < (300_000 if outputs else 120_000)


def test_thinning_keeps_the_extremes() -> None:
    layers = [layer(place, 40 + place % 7) for place in range(5000)]
    layers[1234] = layer(1234, 3.25)
    svg = draw([("", layers)])
    assert svg is not None and "3.2 to 46.0 dB" in svg
    dots = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", svg)][1:]  # the first is the legend's
    assert sorted(dots)[-1] > sorted(dots)[-2] + 100
    assert 100 < len(dots) < 2000


def test_the_error_of_outputs_is_beside_that_of_weights() -> None:
    """As many dots as before, a diamond for each layer that was measured, on one axis; a legend says which is which."""
    layers = [layer(0, 40.0), layer(1, 44.0, "feed-forward"), layer(2, 42.0, "feed-forward")]
    alone = draw([("", layers)])
    both = draw([("", [replace(layers[0], output=30.0), replace(layers[1], output=44.0), layers[2]])])
    assert alone is not None and both is not None
    assert not of_outputs(alone) and "output" not in alone
    texts = [element.text for element in check(both).iter() if element.tag.endswith("text")]
    assert {"weight", "layer's output, on what the original gives to the layer"} <= set(texts)
    assert "3 quantized layers, 40.0 to 44.0 dB; 2 of their outputs, 30.0 to 44.0 dB" in both
    legend, worse, same = of_outputs(both)
    dots = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", both)]
    assert same == pytest.approx(dots[-2] - 4, abs=0.11) and worse > max(dots[-3:]) > legend
    only = draw([("", [replace(layer(place, None), output=30.0 + place) for place in range(2)])])
    assert only is not None and len(of_outputs(only)) == 3


def test_texts_and_legend() -> None:
    layers = [layer(0, 40.0, "attention"), layer(1, 45.0, "feed-forward"), layer(2, None, "other")]
    svg = draw([("transformer", layers), ("text<encoder>&", layers)])
    assert svg is not None
    texts = [element.text for element in check(svg).iter() if element.tag.endswith("text")]
    assert {"attention", "feed-forward", "SQNR in dB (higher is better)", "layers, in the model's order"} <= set(texts)
    assert "text<encoder>&" in texts and "other" not in texts


@pytest.mark.parametrize("values", [[], [40.0], [None, None], [float("inf"), 40.0]])
def test_nothing_to_draw(values: list[float | None]) -> None:
    assert draw([("", [layer(place, value) for place, value in enumerate(values)])]) is None


@pytest.mark.parametrize("values", [(40.0, 40.0), (0.0, 0.0), (-3.0, 120.0), (46.98, 46.99)])
def test_any_range_has_an_axis(values: tuple[float, float]) -> None:
    svg = draw([("", [layer(place, value) for place, value in enumerate(values)])])
    assert svg is not None
    check(svg)
    assert 3 <= svg.count('text-anchor="end"') <= 8


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer_blocks.0.attn1.to_out.0", "attention"),
        ("transformer_blocks.0.norm1.linear", "conditioning"),
        ("time_text_embed.timestep_embedder.linear_1", "conditioning"),
        ("single_transformer_blocks.0.proj_mlp", "feed-forward"),
        ("single_transformer_blocks.0.proj_out", "feed-forward"),
        ("transformer_blocks.3.ff_context.net.2", "feed-forward"),
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.mlp.down_proj", "feed-forward"),
        ("encoder.layer.0.attention.output.dense", "attention"),
        ("encoder.layer.0.intermediate.dense", "feed-forward"),
        ("encoder.layer.0.output.dense", "feed-forward"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", "feed-forward"),
        ("encoder.block.0.layer.0.SelfAttention.q", "attention"),
        ("proj_out", "in and out"),
        ("pooler.dense", "in and out"),
        ("lm_head", "in and out"),
        ("something", "other"),
    ],
)
def test_kinds_of_layers(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_patterns_collapse_what_repeats_only() -> None:
    names = [f"blocks.{block}.net.{place}.w" for block in range(3) for place in (0, 2)]
    names += [f"blocks.{block}.ff.0.proj" for block in range(3)] + ["solo.0.w"]
    found = patterns(names)
    assert found["blocks.1.net.2.w"] == "blocks.*.net.*.w"
    assert found["blocks.1.ff.0.proj"] == "blocks.*.ff.0.proj"
    assert found["solo.0.w"] == "solo.0.w"
