"""What a recipe is, and the rules that it gives for one component. Values only until schemes are resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from aoconvert.errors import AoconvertError, PlanError, UsageError
from aoconvert.recipes.rules import Rule, Rules

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme


@dataclass(frozen=True)
class Choice:
    """A scheme with its options, as people write them.

    Attributes:
        scheme: one of its names; ``None``: leave the tensor as it is.
        group_size: values that share a scale.
        settings: fields of the torchao config and their values as text, in the syntax of ``--set``.
        layout_device: device type that packed weights are for; ``None`` where the recipe does not say.
    """

    scheme: str | None
    group_size: int | None = None
    settings: tuple[tuple[str, str], ...] = ()
    layout_device: str | None = None


@dataclass(frozen=True)
class RecipeRule:
    """A pattern (exact name, or ``re:`` and a regular expression) and what is chosen for the tensors it matches."""

    pattern: str
    choice: Choice


@dataclass(frozen=True)
class Section:
    """The rules of one component, or of all that have no section of their own.

    Attributes:
        default: for what no rule matches; ``None``: ``--scheme`` says it.
        rules: in the file's order, which counts among regular expressions.
    """

    default: Choice | None = None
    rules: tuple[RecipeRule, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        origin: name of the file, for messages and reasons.
        base: for every component without a section of its own, and for a checkpoint that is one model.
        components: a pipeline's component -> its section, which holds alone.
    """

    origin: str
    base: Section = Section()
    components: Mapping[str, Section] = field(default_factory=lambda: MappingProxyType({}))


def rules(
    recipe: Recipe,
    component: str,
    default: Scheme | None,
    *,
    layout_device: str | None = None,
    device: str | None = None,
) -> Rules:
    """The rules for one component.

    Args:
        recipe: the recipe.
        component: its name, ``""`` where the checkpoint is a single model.
        default: what ``--scheme`` asks for, for what no rule matches; ``None`` where it is not given.
        layout_device: device type that packed weights are for, as ``--layout-device`` says; it goes before the recipe.
        device: the same where neither says.

    Raises:
        UsageError: a scheme that does not take its options; or recipe and ``--scheme`` both give a default.
        PlanError: a scheme that cannot run with the installed packages.
    """
    section = recipe.components.get(component, recipe.base)
    resolver = _Resolver(recipe.origin, layout_device, device)
    made = tuple(
        Rule(rule.pattern, resolver.scheme(rule.choice, f"rule {rule.pattern!r}"), recipe.origin)
        for rule in section.rules
    )
    if section.default is None:
        return Rules(made, default)
    if default is not None:
        raise UsageError(
            f"{recipe.origin} has a default ({section.default.scheme or 'skip'}), but the command line says "
            f"{default.name}",
            hint="omit --scheme and the scheme of --component, or remove the default from the recipe",
        )
    return Rules(made, resolver.scheme(section.default, "default"))


class _Resolver:
    """Makes a scheme of every choice, each once."""

    def __init__(self, origin: str, layout_device: str | None, device: str | None) -> None:
        self._origin = origin
        self._layout_device = layout_device
        self._device = device
        self._made: dict[Choice, Scheme] = {}

    def scheme(self, choice: Choice, place: str) -> Scheme | None:
        if choice.scheme is None:
            return None
        if choice not in self._made:
            from aoconvert import schemes

            device = self._layout_device or choice.layout_device or self._device
            try:
                self._made[choice] = schemes.get(
                    choice.scheme,
                    group_size=choice.group_size,
                    settings=dict(choice.settings),
                    layout_device=device,
                )
            except PlanError as error:
                raise PlanError([f"{self._origin}, {place}: {line}" for line in error.problems]) from error
            except UsageError as error:
                raise at(self._origin, place, error) from error
        return self._made[choice]


def at(origin: str, place: str, error: AoconvertError) -> UsageError:
    """The same error with the place in the recipe."""
    return UsageError(f"{origin}, {place}: {error.message}", hint=error.hint)
