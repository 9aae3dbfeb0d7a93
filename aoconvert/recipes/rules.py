"""Which scheme is for which tensor: patterns with the syntax and the precedence of torchao's ``FqnToConfig``.

Source: ``torchao/quantization/quant_api.py`` of 0.18, ``FqnToConfig`` and ``_fqn_to_config_handler``. Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

_REGEX = "re:"

# Rules that match nothing for which the nearest names are looked for: among those of a large model that takes a second
_ADVISED = 3


@dataclass(frozen=True)
class Rule:
    """What one pattern says.

    Attributes:
        pattern: exact name of a tensor or module, or ``re:`` and a regular expression that matches one fully.
        scheme: what to quantize to; ``None``: leave it as it is.
        origin: where the rule stands: ``--skip``, the name of a recipe file.
    """

    pattern: str
    scheme: Scheme | None = field(compare=False)
    origin: str

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.origin} {self.pattern}"

    @property
    def reason(self) -> str:
        """Why a tensor stays that the rule leaves alone; for the manifest and the card, beside which no recipe lies."""
        return self.label if self.origin.startswith("--") else f"the recipe's rule {self.pattern}"

    @cached_property
    def regex(self) -> re.Pattern[str] | None:
        """The regular expression; ``None``: the pattern is an exact name."""
        return re.compile(self.pattern[len(_REGEX) :]) if self.pattern.startswith(_REGEX) else None

    def matches(self, name: str) -> bool:
        """Whether the pattern means this tensor or module."""
        if self.regex is not None:
            return self.regex.fullmatch(name) is not None
        return bool(name) and self.pattern == name


@dataclass(frozen=True)
class _Sorted:
    """Rules by kind: a recipe may have one for every layer of a large model."""

    exact: Mapping[str, Rule]
    regex: tuple[tuple[re.Pattern[str], Rule], ...]

    @classmethod
    def of(cls, rules: Iterable[Rule]) -> _Sorted:
        """The first of several rules with the same exact name counts."""
        exact: dict[str, Rule] = {}
        regex = []
        for rule in rules:
            if rule.regex is None:
                exact.setdefault(rule.pattern, rule)
            else:
                regex.append((rule.regex, rule))
        return cls(exact, tuple(regex))

    def match(self, names: tuple[str, ...]) -> Rule | None:
        """The first rule that means the first of the names, else the next."""
        for name in names:
            if name and name in self.exact:
                return self.exact[name]
        return next((rule for name in names for regex, rule in self.regex if regex.fullmatch(name)), None)


@dataclass(frozen=True)
class Rules:
    """Every rule for one component.

    Attributes:
        rules: in their order, which counts among regular expressions.
        default: for what no rule matches; ``None``: leave it as it is.
        skip: what the command line leaves out; it goes before every rule.
    """

    rules: tuple[Rule, ...]
    default: Scheme | None
    skip: tuple[Rule, ...] = ()

    def __iter__(self) -> Iterator[Rule]:
        yield from (*self.skip, *self.rules)

    def match(self, tensor: str, module: str) -> Rule | None:
        """The rule for a tensor, ``None`` where the default holds.

        In this order: an exact tensor name, an exact module name, the first regular expression for the tensor, the
        first one for the module.
        """
        return next((found for rules in self._sorted if (found := rules.match((tensor, module)))), None)

    @cached_property
    def _sorted(self) -> tuple[_Sorted, _Sorted]:
        return _Sorted.of(self.skip), _Sorted.of(self.rules)


def skip_rules(patterns: Iterable[str]) -> tuple[Rule, ...]:
    """The rules of ``--skip``."""
    return tuple(Rule(pattern, None, "--skip") for pattern in patterns)


def allow_rules(patterns: Iterable[str]) -> tuple[Rule, ...]:
    """The rules of ``--allow-missing``."""
    return tuple(Rule(pattern, None, "--allow-missing") for pattern in patterns)


def find_unmatched(rules: Iterable[Rule], names: Iterable[str]) -> list[str]:
    """One line for every rule that matches none of these tensors and modules, for a few with the nearest names."""
    known = sorted({name for name in names if name})
    exact = frozenset(known)
    lines = []
    advised = 0
    for rule in rules:
        if rule.pattern in exact or (rule.regex is not None and any(map(rule.matches, known))):
            continue
        near: list[str] = []
        if rule.regex is None and advised < _ADVISED:
            near = difflib.get_close_matches(rule.pattern, known, n=3, cutoff=0.5)
            advised += 1
        nearest = f" (nearest: {', '.join(near)})" if near else ""
        if rule.regex is None and "*" in rule.pattern:
            nearest = f" (without re: it is a name, not a regular expression; use re:{_as_regex(rule.pattern)})"
        lines.append(f"{rule.origin} {rule.pattern!r} matches nothing{nearest}")
    return lines


def _as_regex(glob: str) -> str:
    """The regular expression that says what somebody meant by ``*``."""
    return ".*".join(map(re.escape, glob.split("*")))
