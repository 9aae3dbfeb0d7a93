"""Which scheme a tensor gets, and why another gets none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aoconvert.models import Skeleton, TensorSpec
from aoconvert.models.experts import Settled, settle
from aoconvert.models.trial import Trial, trial_of
from aoconvert.recipes.rules import Rule, Rules
from aoconvert.schemes import Scheme, blocker
from aoconvert.schemes.apply import quantize_weight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Wishes:
    """What else the user said about which tensors are quantized.

    Attributes:
        embeddings: embedding tables too, with a scheme that they can take.
        default_skips: leave alone what a careful converter leaves alone.
        carry: keep the codes of a quantized original where they fit.
    """

    embeddings: bool = False
    default_skips: bool = True
    carry: bool = False


@dataclass(frozen=True)
class SchemeChoice:
    """The scheme for a tensor, or why there is none; ``rule`` is the one that asked for a scheme."""

    scheme: Scheme | None
    reason: str | None
    rule: Rule | None = None


@dataclass(frozen=True)
class Choices:
    """The choices for a component, by tensor.

    Attributes:
        implementation: how its quantized experts have to be multiplied, ``None`` where that makes no difference.
        problems: what was asked for and cannot be had.
        cannot_run: the error that the model, not quantized, raises in these dtypes; ``None`` where it runs, or nobody
            knows.
    """

    tensors: Mapping[str, SchemeChoice] = field(default_factory=dict)
    implementation: str | None = None
    problems: tuple[str, ...] = ()
    cannot_run: str | None = None

    def of(self, spec: TensorSpec) -> SchemeChoice:
        """The choice for a tensor; one that shares its memory has none of its own."""
        if spec.tied_to:
            return SchemeChoice(None, f"the same tensor as {spec.tied_to}")
        return self.tensors[spec.name]


def choose_schemes(skeleton: Skeleton, dtypes: Mapping[str, torch.dtype], rules: Rules, wishes: Wishes) -> Choices:
    """Choose for every tensor of a model that is written.

    Args:
        skeleton: the empty model.
        dtypes: of its tensors when they are quantized.
        rules: which scheme is for which tensor.
        wishes: what else the user said about that.
    """
    trial = trial_of(skeleton, dtypes)
    skeleton = _with_rows(skeleton, trial.seen.rows)
    twins: dict[str, list[TensorSpec]] = {}
    for spec in skeleton:
        if spec.tied_to:
            twins.setdefault(spec.tied_to, []).append(spec)
    found = {
        spec.name: _choose(spec, dtypes[spec.name], rules, wishes, twins.get(spec.name, []))
        for spec in skeleton
        if not spec.tied_to
    }
    found, implementation = _try(skeleton, found, trial)
    return Choices(found, implementation, tuple(_list_refused(skeleton, found)), trial.seen.error)


def _with_rows(skeleton: Skeleton, rows: Mapping[str, int]) -> Skeleton:
    """The skeleton with the layers that a forward has shown to see one row; the others are known by their names."""
    tensors = tuple(
        replace(spec, single_row=rows[spec.name] == 1) if spec.kind == "linear" and spec.name in rows else spec
        for spec in skeleton
    )
    return replace(skeleton, tensors=tensors)


def _try(
    skeleton: Skeleton, found: Mapping[str, SchemeChoice], trial: Trial
) -> tuple[dict[str, SchemeChoice], str | None]:
    """Leave out what the model cannot use quantized so; how its experts have to be multiplied."""
    experts: dict[str, Scheme] = {}
    layers: dict[str, Scheme] = {}
    for spec in skeleton:
        if not spec.tied_to and (scheme := found[spec.name].scheme) is not None:
            (experts if spec.kind == "experts" else layers)[spec.name] = scheme
    settled = settle(skeleton, experts, quantize_weight) if experts else Settled(None, {})
    refused = {**settled.refused, **trial.faults(layers, quantize_weight, lambda scheme: scheme.key)}
    left = {name: SchemeChoice(None, why, found[name].rule) for name, why in refused.items()}
    return {**found, **left}, settled.implementation


def _choose(
    spec: TensorSpec, dtype: torch.dtype, rules: Rules, wishes: Wishes, twins: list[TensorSpec]
) -> SchemeChoice:
    rule = rules.match(spec.name, spec.module)
    asked = rule if rule is not None and rule.scheme is not None else None
    if (why := _unquantizable(spec, wishes, asked)) is not None:
        return SchemeChoice(None, why, asked)
    scheme = rule.scheme if rule is not None else rules.default
    if scheme is None:
        return SchemeChoice(None, rule.reason if rule is not None else "no rule matches it")
    why = "the model class keeps it in float32" if spec.keep_fp32 else None
    if why is None and asked is None and wishes.default_skips:
        why = _taste(spec, scheme, twins)
    why = why or _unfit(spec, scheme, twins) or blocker(spec.shape, dtype, scheme)
    return SchemeChoice(scheme if why is None else None, why, asked)


def _unquantizable(spec: TensorSpec, wishes: Wishes, rule: Rule | None) -> str | None:
    """Why no scheme can take the tensor, whatever it is."""
    if not spec.floating:
        return "not a floating-point tensor"
    if spec.kind == "embedding":
        return None if wishes.embeddings or rule is not None else "an embedding table"
    if spec.kind in ("linear", "experts"):
        return None
    if spec.convolution:
        return f"{spec.module_class}: a convolution; torchao's schemes are for linear layers"
    return f"{spec.module_class}: not the weight of a linear layer"


def _taste(spec: TensorSpec, scheme: Scheme, twins: list[TensorSpec]) -> str | None:
    """Why a careful converter leaves the tensor alone, though the scheme could take it."""
    if spec.single_row and spec.kind == "linear" and scheme.format.activation and scheme.layout.min_capability:
        return "sees one row per sample: quantized activations would cost accuracy and save no time"
    if spec.hint is not None:
        return spec.hint
    twin = next((twin for twin in twins if twin.hint is not None), None)
    if twin is None:
        return None
    return f"the same tensor as {twin.name} ({twin.hint}); --untie, or --no-default-skips for both"


def _unfit(spec: TensorSpec, scheme: Scheme, twins: list[TensorSpec]) -> str | None:
    """Why what the scheme makes of the tensor could not be loaded, or not be used."""
    rival = next((item.compared_with for item in (spec, *twins) if item.compared_with is not None), None)
    if rival is not None:
        return (
            f"the library compares it with {rival} when it opens the model, which torchao's tensors do not "
            f"support; --untie"
        )
    if scheme.entry.fails_on_single_row and spec.single_row:
        rows = "an expert may see a single row" if spec.kind == "experts" else "sees one row per sample"
        return f"{rows}, which {scheme.name} cannot run"
    if not scheme.entry.embeddings and any(item.kind == "embedding" for item in (spec, *twins)):
        return f"an embedding table; {scheme.name} tensors do not support row lookup"
    return None


def _list_refused(skeleton: Skeleton, found: Mapping[str, SchemeChoice]) -> list[str]:
    """One line for every rule that asked for a scheme, and got it for no tensor at all."""
    got = {choice.rule for choice in found.values() if choice.rule is not None and choice.scheme is not None}
    blocked: dict[Rule, list[tuple[str, str]]] = {}
    for spec in skeleton:
        choice = found.get(spec.name)
        if choice is not None and choice.rule is not None and choice.rule not in got:
            blocked.setdefault(choice.rule, []).append((spec.name, choice.reason or ""))
    lines = []
    for rule, tensors in blocked.items():
        # a module's bias says nothing about its rule
        name, why = next((item for item in tensors if not item[0].endswith("bias")), tensors[0])
        lines.append(f"{skeleton.component.title}: {rule.label} quantizes nothing ({name}: {why})")
    return lines
