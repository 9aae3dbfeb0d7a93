"""The figures of two outputs, beside what a plain computation in memory gives."""

from __future__ import annotations

import math

import pytest
import torch

from aoconvert.evaluation import figures
from aoconvert.evaluation.figures import NotFiniteError, SampleFigures, compare_logits, compare_vectors, summarize


def logits(seed: int, rows: int = 40, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)).mul(3).to(torch.bfloat16)


def test_a_copy_of_the_original_differs_in_nothing() -> None:
    found = summarize([compare_logits(logits(0), logits(0), torch.arange(40)), compare_logits(logits(1), logits(1))])
    assert (found.kl_mean, found.kl_max, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.perplexity_source
    same = summarize([compare_vectors(logits(0), logits(0))])
    assert (same.cosine_mean, same.cosine_tokens_min, same.output_relative_error) == (1.0, 1.0, 0.0)
    assert same.output_sqnr_db is None


@pytest.mark.parametrize("at_once", [1, 130, 1 << 22])
def test_logits_are_compared_as_torch_does(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are looked at together."""
    monkeypatch.setattr(figures, "_WIDE", at_once)
    before, after, targets = logits(0), logits(0) + 0.1 * logits(1), torch.arange(40)
    found = summarize([compare_logits(before, after, targets)])
    p, q = (torch.log_softmax(values.double(), -1) for values in (before, after))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-12)
    assert found.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-12)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-12)
    assert found.top1_agreement == float((before.argmax(-1) == after.argmax(-1)).double().mean())
    expected = math.exp(float(torch.nn.functional.cross_entropy(after.double(), targets)))
    assert found.perplexity == pytest.approx(expected, rel=1e-12)


def test_noise_of_a_known_size_gives_the_figure_of_theory() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(500, 400, generator=generator, dtype=torch.float64)
    after = before + 0.01 * torch.randn(500, 400, generator=generator, dtype=torch.float64)
    found = summarize([compare_vectors(before, after)])
    assert found.output_sqnr_db == pytest.approx(40.0, abs=0.05)
    # the part of the noise across the output turns it: cos = 1/√(1 + 0.01²)
    assert found.cosine_tokens_mean == pytest.approx(1 / math.sqrt(1 + 1e-4), abs=1e-6)
    # logits with noise of variance s²: KL ≈ s²·(1 − Σp²)/2, as the curvature of ln Σ exp is diag(p) − p·pᵀ
    noisy = before[:, :50] * 2
    shifted = noisy + 0.02 * torch.randn(noisy.shape, generator=generator, dtype=torch.float64)
    kl = summarize([compare_logits(noisy, shifted)]).kl_mean
    p = torch.softmax(noisy, -1)
    assert kl == pytest.approx(float((0.02**2 * (1 - p.square().sum(-1)) / 2).mean()), rel=0.05)


def test_a_value_that_both_rule_out_counts_nothing() -> None:
    before, after = logits(0).float(), logits(1).float()
    before[:, 3] = after[:, 3] = -math.inf
    kept = [at for at in range(50) if at != 3]
    expected = compare_logits(before[:, kept], after[:, kept]).kl
    assert compare_logits(before, after).kl == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_a_culprit(value: float) -> None:
    broken = logits(0)
    broken[7, 7] = value
    for compare in (compare_logits, compare_vectors):
        with pytest.raises(NotFiniteError) as found:
            compare(logits(0), broken)
        assert found.value.whose == "quantized"
        with pytest.raises(NotFiniteError) as found:
            compare(broken, broken)
        assert found.value.whose == "original"
    ruled_out = logits(0)
    ruled_out[0, 0] = -math.inf
    with pytest.raises(NotFiniteError):
        compare_logits(logits(0), ruled_out)


def test_the_figures_of_samples_are_kept_as_json_values() -> None:
    found = compare_logits(logits(0), logits(1), torch.arange(40))
    assert SampleFigures(**found.to_dict()) == found
    assert summarize([]).model_dump(exclude_none=True) == {}
