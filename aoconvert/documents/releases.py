"""Documents of ``release``."""

from __future__ import annotations

from typing import Literal

from aoconvert.releasing.record import Record


class ReleaseDocument(Record):
    """The last line of ``release --json``; without ``event`` it is ``release.json``."""

    event: Literal["summary"]
