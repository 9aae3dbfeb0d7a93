"""What a release that runs as a job on Hugging Face can be told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from aoconvert.errors import UsageError

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class JobOptions:
    """How a job is started.

    Attributes:
        flavor: the machine, such as ``cpu-xl``; ``None``: the cheapest that is large enough.
        timeout: seconds after which an attempt is stopped; ``None``: by the plan's bytes.
        attempts: how often the job is started at most, if it fails.
        bucket: ``name`` or ``namespace/name`` of the bucket that keeps what is made.
        namespace: user or organization that the job runs under, and that pays; ``None``: the token's user.
        requirement: what is installed as aoconvert in the job, as pip takes it; ``None``: this version, from PyPI.
        confirm: start the job, which costs money; without it only the plan is made.
    """

    flavor: str | None = None
    timeout: int | None = None
    attempts: int = 1
    bucket: str = "aoconvert-releases"
    namespace: str | None = None
    requirement: str | None = None
    confirm: bool = False


def parse_duration(text: str) -> int:
    """Seconds from ``90``, ``90s``, ``30m``, ``1.5h`` or ``1d``, as the Hub's own tools take it.

    Raises:
        UsageError: not a duration, or none at all.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([smhd]?)\s*", text)
    seconds = int(Fraction(match[1]) * _SECONDS[match[2]]) if match else 0
    if seconds < 1:
        raise UsageError(f"{text!r} is not a duration", hint="write 90m, 6h or 1d")
    return seconds
