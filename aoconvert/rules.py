"""Which scheme is for which tensor: patterns with the syntax and the precedence of torchao's ``FqnToConfig``.

Source: ``torchao/quantization/quant_api.py`` of 0.18, ``FqnToConfig`` and ``_fqn_to_config_handler``. Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

_REGEX = "re:"


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
        """How reasons and messages call it."""
        return f"{self.origin} {self.pattern}"

    def matches(self, name: str) -> bool:
        """Whether the pattern means this tensor or module."""
        if self.pattern.startswith(_REGEX):
            return re.fullmatch(self.pattern[len(_REGEX) :], name) is not None
        return bool(name) and self.pattern == name


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
        for rules in (self.skip, self.rules):
            exact = [rule for rule in rules if not rule.pattern.startswith(_REGEX)]
            regex = [rule for rule in rules if rule.pattern.startswith(_REGEX)]
            for group, name in ((exact, tensor), (exact, module), (regex, tensor), (regex, module)):
                found = next((rule for rule in group if rule.matches(name)), None)
                if found is not None:
                    return found
        return None


def skipping(patterns: Iterable[str]) -> tuple[Rule, ...]:
    """The rules of ``--skip``."""
    return tuple(Rule(pattern, None, "--skip") for pattern in patterns)


def unmatched(rules: Iterable[Rule], names: Iterable[str]) -> list[str]:
    """One line for every rule that matches none of these tensors and modules, with the nearest names."""
    known = {name for name in names if name}
    lines = []
    for rule in rules:
        if any(rule.matches(name) for name in known):
            continue
        near: list[str] = []
        if not rule.pattern.startswith(_REGEX):
            near = difflib.get_close_matches(rule.pattern, sorted(known), n=3, cutoff=0.5)
        nearest = f" (nearest: {', '.join(near)})" if near else ""
        lines.append(f"{rule.origin} {rule.pattern!r} matches nothing{nearest}")
    return lines
