"""Better schemes have better figures, and a choice by the outputs' error is better than one by the weights'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluating import Line, asked
from helpers.trained import train_llama

import aoconvert
from aoconvert.checkpoint.evaluation import Metrics
from aoconvert.searching.sensitivity import read_sensitivity

__all__ = ["asked"]

_SCHEMES = ("int8wo", "int4wo", "intx2wo")
_TEXT = """
A model that is quantized has weights with fewer bits, so that it needs less memory and less time to be read. How much
it loses by that is measured on its outputs, beside those of the original, on the same text. The old bridge across the
river was closed for repairs in March, and the ferry took its place until the first days of autumn. She put the letter
on the table, looked out of the window for a while, and then began to read it again from the first line. Proteins fold
into shapes that decide what they do; two chains that differ in one place only may behave in quite different ways.
"""


def evaluated(source: Path, scheme: str, tmp_path: Path, *, text: Path | None, **options: Any) -> Metrics:
    output = tmp_path / f"out-{scheme}-{len(list(tmp_path.iterdir()))}"
    aoconvert.quantize(source, scheme, device="cpu", output=output, min_quantized=0.0, **options)
    given: dict[str, Any] = {} if text is None else {"text": [text]}
    report = aoconvert.evaluate(output, source=str(source), samples=4, tokens=48, **given)
    return report.components[0].metrics


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(_TEXT)
    return file


@pytest.mark.exhaustive
def test_the_order_of_schemes_on_minilm(
    checkpoints: Callable[[str], Path], tmp_path: Path, text: Path, asked: list[Line]
) -> None:
    found = [evaluated(checkpoints("bert"), scheme, tmp_path, text=text) for scheme in _SCHEMES]
    cosines = [metrics.cosine_mean for metrics in found]
    assert cosines == sorted(cosines, reverse=True)  # type: ignore[type-var]
    assert cosines[0] > 0.999  # type: ignore[operator]
    sqnrs = [metrics.output_sqnr_db for metrics in found]
    assert sqnrs == sorted(sqnrs, reverse=True)  # type: ignore[type-var]


def bits(folder: Path) -> float:
    from aoconvert.checkpoint import manifest

    found = manifest.load(folder).components[0].totals.bits_per_weight
    assert found is not None
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("wanted", [10.6, 11.0, 12.0, 13.0])
def test_a_choice_by_what_the_model_gives_is_better_at_the_same_size(
    wanted: float, checkpoints: Callable[[str], Path], tmp_path: Path, text: Path, asked: list[Line]
) -> None:
    """On MiniLM's real weights, from nearly all layers in int4 to nearly all in int8."""
    source = checkpoints("bert")
    evaluated(source, "int4wo", tmp_path, text=text)
    [report] = tmp_path.glob("out-int4wo-*/aoconvert.eval.json")
    wishes: dict[str, Any] = {"target_bits": wanted, "candidates": "int4wo,int8wo", "text": text}
    by_weights = evaluated(source, "auto", tmp_path, **wishes)
    by_outputs = evaluated(source, "auto", tmp_path, sensitivity=report, **wishes)
    sizes = [bits(folder) for folder in sorted(tmp_path.glob("out-auto-*"))]
    print(f"{wanted} bits: cosine {by_weights.cosine_mean} by weights, {by_outputs.cosine_mean} by outputs {sizes}")
    assert max(sizes) <= 1.01 * min(sizes)
    assert by_outputs.cosine_mean > by_weights.cosine_mean  # type: ignore[operator]


@pytest.mark.exhaustive
def test_a_trained_llama(tmp_path: Path, asked: list[Line]) -> None:
    """The order of the schemes, and at three sizes a choice by outputs, of lower KL than one by weights."""
    source = tmp_path / "model"
    assert train_llama(source) < 1.5  # a model that knows nothing has log 96 = 4.6
    found = [evaluated(source, scheme, tmp_path, text=None) for scheme in ("int8wo", "int4wo-32", "intx2wo")]
    divergences = [metrics.kl_mean for metrics in found]
    assert divergences == sorted(divergences)  # type: ignore[type-var]
    assert divergences[0] < 0.001 < 0.1 < divergences[2]  # type: ignore[operator]
    [report] = tmp_path.glob("out-int4wo-32-*/aoconvert.eval.json")
    for wanted in (6.0, 6.5, 7.5):
        place = tmp_path / str(wanted)
        place.mkdir()
        wishes: dict[str, Any] = {"target_bits": wanted, "candidates": "int4wo-32,int8wo", "text": None}
        by_weights = evaluated(source, "auto", place, **wishes)
        by_outputs = evaluated(source, "auto", place, sensitivity=report, **wishes)
        sizes = [bits(folder) for folder in sorted(place.glob("out-auto-*"))]
        print(f"{wanted} bits: KL {by_weights.kl_mean} by weights, {by_outputs.kl_mean} by outputs {sizes}")
        assert max(sizes) <= 1.01 * min(sizes)
        assert by_outputs.kl_mean < by_weights.kl_mean  # type: ignore[operator]


def test_what_is_not_a_report_of_layers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "aoconvert.eval.json"
    file.write_text("{}")
    with pytest.raises(aoconvert.UsageError, match="is not a report of aoconvert eval"):
        read_sensitivity(file)
    with pytest.raises(aoconvert.UsageError, match="No such file"):
        read_sensitivity(tmp_path / "absent.json")
    wishes: dict[str, Any] = {"sensitivity": file, "device": "cpu"}
    with pytest.raises(aoconvert.UsageError, match="--sensitivity: these need --scheme auto"):
        aoconvert.plan("model", "int8wo", **wishes)
    with pytest.raises(aoconvert.UsageError, match="exclude each other"):
        aoconvert.plan("model", "auto", min_sqnr=30.0, **wishes)
