"""What the user wants to keep to, and the schemes that do so with little error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aoconvert.errors import PlanError
from aoconvert.humanize import size
from aoconvert.options import QuantizeOptions
from aoconvert.searching.allocate import Option, Selection, cheapest, error_of, fit
from aoconvert.searching.tensor_options import Survey

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme
    from aoconvert.schemes.error_stats import ErrorStats

_WITHIN = 0.01
_DIGITS = 9

Chosen = dict[str, dict[str, "Scheme | None"]]
"""Component → tensor → scheme."""


@dataclass
class Tensor:
    """A tensor to choose for; the scheme ``None`` leaves it as it is, without an error.

    ``factor``: by which its squared error counts.
    """

    survey: Survey
    name: str
    schemes: list[Scheme | None]
    errors: list[ErrorStats | None]
    factor: float = 1.0

    def options(self, cost: Callable[[str, Scheme | None], int]) -> list[Option]:
        """What each scheme costs. The last digits of an error hang on how it was computed: they decide nothing."""
        noises = [error.noise * self.factor if error is not None else 0.0 for error in self.errors]
        return [
            Option(cost(self.name, scheme), float(f"{noise:.{_DIGITS}e}"))
            for scheme, noise in zip(self.schemes, noises, strict=True)
        ]


@dataclass(frozen=True)
class SearchResult:
    """A choice; ``why`` is the reason of a tensor that could take a scheme and has none."""

    chosen: Chosen
    why: str
    warnings: tuple[str, ...] = ()


def reach(tensors: Sequence[Tensor], options: QuantizeOptions, fixed: int) -> SearchResult:
    """Choose by the goal that the options name.

    Args:
        tensors: what there is to choose for.
        options: one of ``min_sqnr``, ``target_bits`` and ``target_size`` is set.
        fixed: bytes of weights files that are not chosen for.

    Raises:
        PlanError: the goal cannot be reached.
    """
    if options.min_sqnr is not None:
        limit = options.min_sqnr
        selection = tuple(_least(tensor, limit) for tensor in tensors)
        return SearchResult(_name_choice(tensors, selection), f"auto: no candidate reaches {limit:g} dB")
    if options.target_bits is not None:
        return _bits(tensors, options.target_bits)
    assert options.target_size is not None
    return _reach_size(tensors, options.target_size, fixed)


def _least(tensor: Tensor, limit: float) -> int:
    """The scheme with the fewest bytes whose SQNR, as the manifest will round it, is not below ``limit``."""
    passed = []
    for at, (scheme, error) in enumerate(zip(tensor.schemes, tensor.errors, strict=True)):
        if error is None:
            continue
        sqnr = math.inf if error.noise == 0 else error.sqnr_db
        if sqnr is not None and sqnr >= limit:
            passed.append((tensor.survey.data_bytes(tensor.name, scheme), -sqnr, at))
    return min(passed)[2] if passed else 0


def _name_choice(tensors: Sequence[Tensor], selection: Selection) -> Chosen:
    chosen: Chosen = {}
    for tensor, at in zip(tensors, selection, strict=True):
        chosen.setdefault(tensor.survey.component, {})[tensor.name] = tensor.schemes[at]
    return chosen


@dataclass(frozen=True)
class _Goal:
    """A number of bytes, and how to speak of it.

    Attributes:
        flag: the option that names it.
        where: the component and a colon, or nothing.
        target: bytes.
        nothing: bytes where nothing is quantized.
        shown: a number of bytes in the option's unit.
        hint: what to do where it cannot be reached.
    """

    flag: str
    where: str
    target: int
    nothing: int
    shown: Callable[[int], str]
    hint: str


def _bits(tensors: Sequence[Tensor], bits: float) -> SearchResult:
    """So many bits a parameter, for each component."""
    chosen: Chosen = {}
    warnings: list[str] = []
    for component in dict.fromkeys(tensor.survey.component for tensor in tensors):
        part = [tensor for tensor in tensors if tensor.survey.component == component]
        selection, warning = _bits_of(part, bits)
        chosen |= _name_choice(part, selection)
        warnings += warning
    return SearchResult(chosen, f"auto: --target-bits {bits:g} leaves room for it unquantized", tuple(warnings))


def _bits_of(tensors: Sequence[Tensor], bits: float) -> tuple[Selection, list[str]]:
    survey = tensors[0].survey
    parameters = survey.plan.totals.parameters

    def exact(selection: Selection) -> int:
        return survey.data_size(_name_choice(tensors, selection)[survey.component])

    def shown(count: int) -> str:
        return f"{8 * count / parameters:.3f} bits per weight"

    where, target = f"{survey.plan.component.title}: ", int(bits * parameters / 8)
    goal = _Goal(f"--target-bits {bits:g}", where, target, survey.data_size({}), shown, _hint(survey.options))
    return _fit(goal, [tensor.options(survey.data_bytes) for tensor in tensors], exact, _singles(tensors))


def _reach_size(tensors: Sequence[Tensor], target: int, fixed: int) -> SearchResult:
    """So many bytes, for all weights files together."""
    surveys = {tensor.survey.component: tensor.survey for tensor in tensors}

    def exact(selection: Selection) -> int:
        return fixed + sum(surveys[name].file_size(chosen) for name, chosen in _name_choice(tensors, selection).items())

    def shown(count: int) -> str:
        return f"{size(count)} ({count} bytes)"

    nothing = fixed + sum(survey.file_size({}) for survey in surveys.values())
    goal = _Goal(f"--target-size {size(target)}", "", target, nothing, shown, _hint(tensors[0].survey.options))
    items = [tensor.options(tensor.survey.file_bytes) for tensor in tensors]
    selection, warnings = _fit(goal, items, exact, _singles(tensors))
    reason = f"auto: {goal.flag} leaves room for it unquantized"
    return SearchResult(_name_choice(tensors, selection), reason, tuple(warnings))


def _fit(
    goal: _Goal, items: Sequence[Sequence[Option]], exact: Callable[[Selection], int], singles: Sequence[Selection]
) -> tuple[Selection, list[str]]:
    """The selection with little error that keeps to the goal, and a warning where it stays far below.

    Raises:
        PlanError: no selection can, or one with nothing quantized does.
    """
    selection = fit(items, goal.target, exact, singles) if goal.target < goal.nothing else None
    if selection is None:
        if goal.target >= goal.nothing:
            problem = f"does not limit anything: with nothing quantized it takes {goal.shown(goal.nothing)}"
            raise PlanError([f"{goal.where}{goal.flag} {problem}"], hint="a smaller goal")
        least, nothing = goal.shown(exact(cheapest(items))), goal.shown(goal.nothing)
        problem = f"cannot be reached: the result takes at least {least}, and {nothing} with nothing quantized"
        raise PlanError([f"{goal.where}{goal.flag} {problem}"], hint=goal.hint)
    reached = exact(selection)
    if reached >= (1 - _WITHIN) * goal.target or error_of(items, selection) == 0:
        return selection, []
    return selection, [f"{goal.where}{goal.flag}: {goal.shown(reached)} is the closest value below it that was found"]


def _hint(options: QuantizeOptions) -> str:
    more = "" if options.include_embeddings else "--include-embeddings, "
    return f"other --candidates, {more}or a larger goal"


def _singles(tensors: Sequence[Tensor]) -> list[Selection]:
    """One scheme for all that can take it, for each scheme; the others have their first choice."""
    keys = dict.fromkeys(scheme.key for tensor in tensors for scheme in tensor.schemes if scheme is not None)
    return [tuple(_place(tensor, key) for tensor in tensors) for key in keys]


def _place(tensor: Tensor, key: str) -> int:
    found = (at for at, scheme in enumerate(tensor.schemes) if scheme is not None and scheme.key == key)
    return next(found, 0)
