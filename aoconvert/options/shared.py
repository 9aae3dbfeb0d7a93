"""What several commands are told in the same words: an original beside the checkpoint, and the size of pictures."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from aoconvert.errors import UsageError
from aoconvert.options.fields import PIXELS, SWITCH, Option, parse_pixels

SourceRevision: TypeAlias = Annotated[
    str | None, Option("Branch, tag or commit of the source. Default: the commit that was quantized.")
]
TrustRemoteCode: TypeAlias = Annotated[bool, Option("Run model code from the checkpoint and the source.", SWITCH)]


class Pictured:
    """Options with a ``size`` of images or videos."""

    size: str | None

    @property
    def width_and_height(self) -> tuple[int, int] | None:
        """Of images and videos, in pixels."""
        return parse_pixels(self.size)

    def check_size(self) -> None:
        """Refuse what is no size.

        Raises:
            UsageError: it is none.
        """
        if self.size is not None and not re.fullmatch(PIXELS, self.size, re.ASCII):
            raise UsageError(f"--size {self.size!r} is not WIDTHxHEIGHT", hint="e.g. --size 1024x768")
