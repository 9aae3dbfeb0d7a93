"""What two outputs have to do with each other: figures of one sample, and of many together.

Differences and sums are float64. The figures of a sample are plain numbers, so that they can be kept in JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from aoconvert.checkpoint.evaluation import Metrics

_WIDE = 1 << 22  # elements that are widened to float64 at once


class NotFiniteError(ValueError):
    """An output holds NaN or infinity; ``whose``: ``original`` or ``quantized``."""

    def __init__(self, whose: str) -> None:
        super().__init__(f"the output of the {whose} model is not finite")
        self.whose = whose


@dataclass(frozen=True)
class SampleFigures:
    """One sample.

    Attributes:
        kl: KL(original‖quantized) of each token, in nats.
        agreed: tokens whose most likely value is the same.
        nll_source, nll: Σ −ln p(token that comes next), of the original and of the quantized model, in nats.
        targets: how many tokens these two are over.
        cosine: of the pooled outputs, for each pooled vector.
        cosine_tokens: of the output of each token.
        signal, noise: ‖original‖² and ‖original − quantized‖² of the outputs.
    """

    kl: list[float] = field(default_factory=list)
    agreed: int = 0
    nll_source: float = 0.0
    nll: float = 0.0
    targets: int = 0
    cosine: list[float] = field(default_factory=list)
    cosine_tokens: list[float] = field(default_factory=list)
    signal: float = 0.0
    noise: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return asdict(self)


def compare_logits(original: torch.Tensor, result: torch.Tensor, targets: torch.Tensor | None = None) -> SampleFigures:
    """Compare distributions over a vocabulary.

    KL(p‖q) = Σ p·(ln p − ln q) for each position, with p and q by softmax in float64; what has a probability of 0
    counts 0.

    Args:
        original, result: logits, (positions, vocabulary).
        targets: (positions,), the tokens that come next, for the likelihoods.

    Raises:
        NotFiniteError: NaN, or a value that only the quantized model rules out.
    """
    kl: list[float] = []
    agreed, sums = 0, [0.0, 0.0]
    for rows in _rows(original):
        p, q = (torch.log_softmax(logits[rows].to(torch.float64), -1) for logits in (original, result))
        for whose, values in (("original", p), ("quantized", q)):
            if bool(values.isnan().any()):
                raise NotFiniteError(whose)
        terms = torch.where(p == -math.inf, torch.zeros_like(p), p.exp() * (p - q))
        kl += terms.sum(-1).clamp_(min=0).tolist()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        if targets is not None:
            for at, values in enumerate((p, q)):
                sums[at] -= float(values.gather(1, targets[rows].to(torch.int64)[:, None]).sum())
    if not all(map(math.isfinite, (*kl, *sums))):
        raise NotFiniteError("quantized")
    return SampleFigures(
        kl=kl, agreed=agreed, nll_source=sums[0], nll=sums[1], targets=len(kl) if targets is not None else 0
    )


def compare_vectors(original: torch.Tensor, result: torch.Tensor) -> SampleFigures:
    """Compare what an encoder gives for each token, and its mean over the tokens.

    Args:
        original, result: (tokens, width).

    Raises:
        NotFiniteError: NaN or infinity.
    """
    for whose, values in (("original", original), ("quantized", result)):
        if not bool(values.isfinite().all()):
            raise NotFiniteError(whose)
    signal = noise = 0.0
    cosines: list[float] = []
    pooled = [torch.zeros(original.shape[-1], dtype=torch.float64) for _ in range(2)]
    for rows in _rows(original):
        a, b = (values[rows].to(torch.float64) for values in (original, result))
        signal += float(a.square().sum())
        noise += float((a - b).square().sum())
        cosines += _cosine(a, b).tolist()
        pooled = [total + values.sum(0) for total, values in zip(pooled, (a, b), strict=True)]
    cosine = _cosine(pooled[0][None], pooled[1][None]).tolist()
    return SampleFigures(cosine=cosine, cosine_tokens=cosines, signal=signal, noise=noise)


def compare_whole(original: torch.Tensor, result: torch.Tensor) -> SampleFigures:
    """Compare two outputs as one vector each: what a denoiser gives, or latents.

    Raises:
        NotFiniteError: NaN or infinity.
    """
    for whose, values in (("original", original), ("quantized", result)):
        if not bool(values.isfinite().all()):
            raise NotFiniteError(whose)
    signal = noise = product = power = 0.0
    for a, b in zip(*(torch.split(values.reshape(-1), _WIDE) for values in (original, result)), strict=True):
        before, after = a.to(torch.float64), b.to(torch.float64)
        signal += float(before.square().sum())
        power += float(after.square().sum())
        product += float((before * after).sum())
        noise += float((before - after).square().sum())
    norm = math.sqrt(signal) * math.sqrt(power)
    cosine = 1.0 if noise == 0 else (max(-1.0, min(1.0, product / norm)) if norm > 0 else 0.0)
    return SampleFigures(cosine=[cosine], signal=signal, noise=noise)


def _rows(values: torch.Tensor) -> Iterator[slice]:
    step = max(1, _WIDE // max(1, values.shape[-1]))
    return (slice(start, start + step) for start in range(0, len(values), step))


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The cosine of each pair of rows; 1 where they are equal, also where both are zero."""
    found = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    found = torch.where((a == b).all(-1), torch.ones_like(found), found)
    return found.nan_to_num(nan=0.0).clamp(-1, 1)


def summarize(samples: Iterable[SampleFigures]) -> Metrics:
    """The figures of all samples; what they have nothing of is absent.

    Means are over tokens, or over samples for what is pooled. Percentiles are those of ``torch.quantile``: between two
    values, linearly. Perplexity is exp(Σ nll / tokens).
    """
    found = list(samples)
    values: dict[str, float] = {}
    if kl := [value for sample in found for value in sample.kl]:
        values |= _spread(kl)
        values["top1_agreement"] = sum(sample.agreed for sample in found) / len(kl)
    if tokens := sum(sample.targets for sample in found):
        values["perplexity_source"] = math.exp(math.fsum(sample.nll_source for sample in found) / tokens)
        values["perplexity"] = math.exp(math.fsum(sample.nll for sample in found) / tokens)
    for name in ("cosine", "cosine_tokens"):
        if cosines := [value for sample in found for value in getattr(sample, name)]:
            values |= {f"{name}_mean": math.fsum(cosines) / len(cosines), f"{name}_min": min(cosines)}
    values |= relative_error(math.fsum(sample.signal for sample in found), math.fsum(sample.noise for sample in found))
    return Metrics(**{name: value for name, value in values.items() if math.isfinite(value)})


def _spread(kl: Sequence[float]) -> dict[str, float]:
    ordered = torch.tensor(kl, dtype=torch.float64)
    parts = torch.quantile(ordered[: 1 << 24], torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    names = ("kl_median", "kl_p90", "kl_p99")
    return {"kl_mean": math.fsum(kl) / len(kl), **dict(zip(names, parts, strict=True)), "kl_max": max(kl)}


def relative_error(signal: float, noise: float) -> dict[str, float]:
    """‖error‖/‖signal‖, and as an SQNR in dB where there is an error; nothing without a signal."""
    if signal <= 0:
        return {}
    error = math.sqrt(noise / signal)
    return {"output_relative_error": error, **({"output_sqnr_db": -20 * math.log10(error)} if error > 0 else {})}
