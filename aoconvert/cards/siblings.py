"""The other variants of a release, from ``release.json``, which anybody may have written.

They are on the card only where one of them belongs to this very manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aoconvert.cards.comparable import METRICS, Diagram, Mark
from aoconvert.cards.metadata import is_repo_id
from aoconvert.cards.plot import MOST, draw_diagrams
from aoconvert.cards.reproduce import ranges
from aoconvert.checkpoint.manifest import SIBLINGS_NAME
from aoconvert.checkpoint.release import Release, ReleasedVariant, VariantNeeds, release_of

_HUB = "https://huggingface.co"
_SQNR = ("lowest SQNR of a weight, dB (higher is better)", False)
# of the models of a pipeline, the one that lost most counts
_WORST: Mapping[str, Callable[[Sequence[float]], float]] = {"kl_mean": max, "psnr_mean": min, "output_sqnr_db": min}


def describe_siblings(folder: Path) -> tuple[dict[str, Any], str | None] | None:
    """The values of the card's section, and its picture; ``None`` where no other variant is known."""
    found = release_of(folder)
    if found is None or len(found[0].variants) < 2:
        return None
    release, own = found
    same = [each for each in release.variants if each.model == own.model]
    figures = {key: compare(same, key) for key in METRICS}
    diagram = draw_errors(same, own)
    values = {
        "name": release.name,
        "rows": [_describe(each, own, figures) for each in same] if len(same) > 1 else [],
        "kl": bool(figures["kl_mean"]),
        "psnr": bool(figures["psnr_mean"]),
        "picture": SIBLINGS_NAME if diagram is not None else None,
        "others": _list_others(release, own),
    }
    return values, draw_diagrams([diagram]) if diagram is not None else None


def compare(variants: Sequence[ReleasedVariant], key: str) -> dict[str, float]:
    """A figure of eval by the variants' names: of those that most of them have on the same data."""
    found = {each.name: (each.metrics_data, value) for each in variants if (value := _figure(each, key)) is not None}
    if not found:
        return {}
    data = Counter(data for data, _ in found.values()).most_common(1)[0][0]
    return {name: value for name, (of, value) in found.items() if of == data}


def _figure(each: ReleasedVariant, key: str) -> float | None:
    values = [metrics[key] for metrics in each.metrics.values() if key in metrics]
    return _WORST[key](values) if values else None


def draw_errors(variants: Sequence[ReleasedVariant], own: ReleasedVariant | None = None) -> Diagram | None:
    """Size against error, of as many variants as can be told apart; ``None`` where there are not two.

    Args:
        variants: of one model.
        own: is marked, and always in it.
    """
    worst = {each.name: each.worst_sqnr_db for each in variants if each.worst_sqnr_db is not None}
    choices = [*((label, compare(variants, key)) for key, label in METRICS.items()), (_SQNR, worst)]
    (label, from_zero), errors = next((choice for choice in choices if len(choice[1]) > 1), choices[-1])
    known = [each for each in variants if each.name in errors and each.size_bytes]
    if own in known and known.index(own) >= MOST:
        known = [*known[: MOST - 1], own]
    marks = tuple(
        Mark(f"{each.name} (this one)" if each is own else each.name, each.size_bytes or 0, errors[each.name], number)
        for number, each in enumerate(known[:MOST])
    )
    if len(marks) < 2:
        return None
    return Diagram("Size and error", "size of the quantized weights", label, marks, from_zero)


def _describe(
    each: ReleasedVariant, own: ReleasedVariant, figures: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    return {
        "name": each.name,
        "url": page_of(each),
        "this": each is own,
        "scheme": each.scheme,
        "size": each.size_bytes,
        "bits": each.bits_per_weight,
        "sqnr": each.worst_sqnr_db,
        "kl": figures["kl_mean"].get(each.name),
        "psnr": figures["psnr_mean"].get(each.name),
        "needs": say_needs(each.needs) if each.needs is not None else "",
    }


def page_of(each: ReleasedVariant) -> str | None:
    """The address of its repo; ``None`` where it is not published."""
    return f"{_HUB}/{each.repo_id}" if is_repo_id(each.repo_id) and each.commit is not None else None


def say_needs(needs: VariantNeeds) -> str:
    """What loads a variant: ``torchao ≥ 0.15, cuda only, compute capability 8.9 or higher``."""
    words = [f"{package} {span.replace('>=', '≥ ')}" for package, span in ranges(needs.loads_with).items()]
    words += [f"{device} only" for device in needs.devices if device != "any"]
    if needs.min_capability is not None:
        words.append(f"compute capability {needs.min_capability} or higher on CUDA")
    return ", ".join(words)


def _list_others(release: Release, own: ReleasedVariant) -> list[dict[str, Any]]:
    """The variants of the release's other models that are published."""
    rows = []
    for model in release.models:
        variants = [each for each in release.variants if each.model == model.name and page_of(each) is not None]
        if model.name != own.model and variants:
            shown = [{"name": each.name, "url": page_of(each)} for each in variants]
            rows.append({"model": model.name, "variants": shown})
    return rows
