"""How long a fresh interpreter may run, and how much memory it may take.

A model can be made so that it never ends, or takes the machine's memory: its forward is code that nobody here wrote.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from aoconvert.errors import UsageError
from aoconvert.options import parse_size

SECONDS = "AOCONVERT_VERIFY_SECONDS"
MEMORY = "AOCONVERT_VERIFY_MEMORY"

# slow disks, old machines and slow lines are far from these
_LEAST_SECONDS = 900.0
_SECONDS_PER_GB = 60.0
_FETCHING_SECONDS_PER_GB = 600.0
_RESERVE = 512 << 20  # bytes that the machine keeps


@dataclass(frozen=True)
class Limits:
    """What the environment says.

    Attributes:
        seconds: that an interpreter may run; ``None``: it depends on how much it reads.
        memory: bytes of anonymous memory that it may have; ``None``: what the machine has, less a reserve.
    """

    seconds: float | None = None
    memory: int | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Limits:
        """From ``AOCONVERT_VERIFY_SECONDS`` and ``AOCONVERT_VERIFY_MEMORY`` (``8GB``).

        Raises:
            UsageError: not a number, or not a size.
        """
        seconds, memory = environment.get(SECONDS), environment.get(MEMORY)
        return cls(_seconds(seconds) if seconds else None, _memory(memory) if memory else None)

    def seconds_for(self, nbytes: int, fetched: int) -> float:
        """Seconds for an interpreter that opens ``nbytes`` of files, and fetches ``fetched`` of them first."""
        if self.seconds is not None:
            return self.seconds
        return _LEAST_SECONDS + (nbytes * _SECONDS_PER_GB + fetched * _FETCHING_SECONDS_PER_GB) / 1e9


def reserve(left: int) -> int:
    """Bytes that must stay free while an interpreter runs, where ``left`` were free when it was started."""
    return min(_RESERVE, left // 4)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise UsageError(f"{SECONDS}={text!r} is not a number of seconds")
    return found


def _memory(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise UsageError(f"{MEMORY}: {error.message}", hint=error.hint) from error
