"""What a comparison found, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

What = Literal["codes", "scales", "dtype", "shape", "class", "values"]
"""What differs first: ``class`` is another tensor class, or the same one with other settings."""


@dataclass(frozen=True)
class Difference:
    """A tensor that both have, and that is not the same.

    Attributes:
        name: in the state dict; of a part of a pipeline ``part/name``.
        what: the first thing that differs.
        sqnr_db: 20·log10(‖a‖/‖a − b‖) of the values, the plain tensor as ``a`` where only one is plain; ``None`` where
            the values are equal as numbers, or cannot be compared.
        detail: what differs, in words.
        comparable: the values could be compared.
    """

    name: str
    what: What
    sqnr_db: float | None
    detail: str
    comparable: bool = True

    @property
    def rank(self) -> tuple[int, float]:
        """The biggest difference first: what cannot be compared, then by SQNR, then what has equal values."""
        if not self.comparable:
            return 0, 0.0
        return (2, 0.0) if self.sqnr_db is None else (1, self.sqnr_db)

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` shows it."""
        return {"name": self.name, "what": self.what, "sqnr_db": self.sqnr_db, "detail": self.detail}


@dataclass(frozen=True)
class Comparison:
    """What differs between two checkpoints.

    Attributes:
        same: how many tensors are bit for bit the same in both.
        different: those that are not, the biggest difference first.
        only_a, only_b: names that the other does not have.
        tied: names that only one has, for a tensor that both have under another name.
        left_out: parts of a pipeline that were not compared, as the other side is one model.
    """

    same: int
    different: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether nothing differs and nothing is missing."""
        return not (self.different or self.only_a or self.only_b)

    def to_dict(self) -> dict[str, Any]:
        """The document of ``aoconvert diff --json``; the keys are stable."""
        return {
            "equal": self.equal,
            "same": self.same,
            "different": [item.to_dict() for item in self.different],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "tied": list(self.tied),
            "left_out": list(self.left_out),
        }
