"""From the weights to rules: which scheme for which tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aoconvert.environment import choose_devices
from aoconvert.errors import PlanError, UsageError
from aoconvert.models import identify
from aoconvert.options import QuantizeOptions
from aoconvert.planning.build import build_plan, resolve_rules
from aoconvert.planning.types import ComponentPlan, Plan
from aoconvert.planning.weights import choose_components
from aoconvert.progress import Progress
from aoconvert.recipes.rules import Rules, skip_rules
from aoconvert.searching.candidates import resolve
from aoconvert.searching.goals import SearchResult, Tensor, reach
from aoconvert.searching.measure import measure
from aoconvert.searching.sensitivity import read_sensitivity, weigh
from aoconvert.searching.tensor_options import Survey

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme
    from aoconvert.sources import Source

Fetch = Callable[[Sequence[str]], None]
"""Makes files of the source local."""


@dataclass(frozen=True)
class Searched:
    """What was found.

    Attributes:
        rules: component → its rules, with exact names of tensors.
        warnings: what the user should know.
    """

    rules: Mapping[str, Rules]
    warnings: tuple[str, ...]


def search(source: Source, options: QuantizeOptions, progress: Progress, fetch: Fetch) -> Searched:
    """Choose a scheme for every tensor of every component that has none of its own.

    It reads the weights once. The same weights and options give the same choice.

    Args:
        source: the resolved source.
        options: what the user said, with ``auto`` for the scheme.
        progress: is told what happens.
        fetch: makes files of the source local.

    Raises:
        PlanError: there are no weights, or the goal cannot be reached.
        UsageError: a candidate that makes no sense.
        QuantizeError: NaN or infinity in a weight.
    """
    ratios = read_sensitivity(options.sensitivity) if options.sensitivity is not None else None
    chosen, problems = choose_components(identify(source, options.subfolder), options)
    if problems:
        raise PlanError(problems)
    free = [item.name for item in chosen if not options.components.get(item.name)]
    if not free:
        raise UsageError("--scheme auto has nothing to choose: every --component has its own scheme")
    device = choose_devices(options.device)[0]
    candidates = resolve(options.candidates, options.layout_device or device.partition(":")[0])
    given = {item.name: resolve_rules(options, item, device) for item in chosen if item.name not in free}

    base = _base(source, options, candidates, free, given)
    parts = _parts(base)
    if empty := [parts[name].component.title for name in free if parts[name].weights is None]:
        raise PlanError([f"{empty[0]}: --scheme auto measures the weights, but {source.label} has none"])
    if source.is_remote:
        fetch([path for name in free if (weights := parts[name].weights) for path in weights.paths])
        base = _base(source, options, candidates, free, given)  # the headers of .bin files are inside them
        parts = _parts(base)
    surveys = [Survey(parts[name], candidates, options) for name in free]
    tensors, failures = _measure(base, surveys, progress)
    if ratios is not None:
        failures += weigh(tensors, ratios)
    fixed = sum(file.size for name in given for file in parts[name].files)
    rules, outcome = _settle(surveys, tensors, options, fixed)
    left_out = [line for survey in surveys for line in survey.warnings]
    return Searched({**given, **rules}, (*left_out, *failures, *outcome.warnings))


def _parts(plan: Plan) -> dict[str, ComponentPlan]:
    return {part.component.name: part for part in plan.components}


def _base(
    source: Source,
    options: QuantizeOptions,
    candidates: Sequence[Scheme],
    free: Sequence[str],
    given: Mapping[str, Rules],
) -> Plan:
    """A plan to read by, with the first candidate that quantizes anything.

    Raises:
        PlanError: what is wrong with the first candidate, where no one can.
    """
    anything = replace(options, min_quantized=0.0)
    problems: list[PlanError] = []
    for scheme in candidates:
        try:
            rules = dict.fromkeys(free, Rules((), scheme, skip_rules(options.skip)))
            return build_plan(source, anything, rules={**given, **rules})
        except PlanError as error:
            problems.append(error)
    raise problems[0]


def _measure(base: Plan, surveys: Sequence[Survey], progress: Progress) -> tuple[list[Tensor], list[str]]:
    """Read the weights once, and note what each candidate does to each tensor."""
    tensors: list[Tensor] = []
    failures: list[str] = []
    progress.start(
        "search", sum(t.bytes_in for survey in surveys for t in survey.plan.tensors if t.name in survey.allowed)
    )
    for survey in surveys:
        measured = measure(base, survey.plan, survey.allowed, progress)
        failures += measured.failures
        for name in (tensor.name for tensor in survey.plan.tensors if tensor.name in survey.allowed):
            errors = measured.errors[name]
            schemes = [scheme for scheme in survey.allowed[name] if scheme.key in errors]
            known = [errors[scheme.key] for scheme in schemes]
            tensors.append(Tensor(survey, name, [None, *schemes], [None, *known]))
    progress.finish()
    return tensors, failures


def _settle(
    surveys: Sequence[Survey], tensors: Sequence[Tensor], options: QuantizeOptions, fixed: int
) -> tuple[dict[str, Rules], SearchResult]:
    """Choose, and again as long as the whole is not what may be written."""
    while True:
        outcome = reach(tensors, options, fixed)
        rules = {
            survey.component: survey.rules(outcome.chosen.get(survey.component, {}), outcome.why) for survey in surveys
        }
        refused = {(survey.component, name) for survey in surveys for name in survey.refused(rules[survey.component])}
        for tensor in tensors:
            if (tensor.survey.component, tensor.name) in refused:
                at = tensor.schemes.index(outcome.chosen[tensor.survey.component][tensor.name])
                del tensor.schemes[at], tensor.errors[at]
                if not tensor.schemes:  # it had to have one
                    tensor.schemes, tensor.errors = [None], [None]
        forced = [
            survey for survey in surveys if options.min_sqnr is None and _force(survey, tensors, outcome, options)
        ]
        if not refused and not forced:
            return rules, outcome


def _force(survey: Survey, tensors: Sequence[Tensor], outcome: SearchResult, options: QuantizeOptions) -> bool:
    """Take the choice to leave them as they are from tensors, as far as ``--min-quantized`` asks for it.

    Those with the least error a parameter first. ``True`` where there were such tensors.
    """
    chosen = outcome.chosen.get(survey.component, {})
    fraction = survey.quantized_fraction(chosen)
    free = [
        tensor
        for tensor in tensors
        if tensor.survey is survey and chosen[tensor.name] is None and len(tensor.schemes) > 1
        if survey.parameters(tensor.name)
    ]
    if fraction >= options.min_quantized or not free:
        return False

    def harm(tensor: Tensor) -> float:
        least = min(error.noise for error in tensor.errors if error is not None)
        return least * tensor.factor / survey.parameters(tensor.name)

    missing = (options.min_quantized - fraction) * survey.outside
    for tensor in sorted(free, key=harm):
        at = tensor.schemes.index(None)
        del tensor.schemes[at], tensor.errors[at]
        missing -= survey.parameters(tensor.name)
        if missing <= 0:
            break
    return True
