"""Every error aoconvert raises on purpose: one root, and each class carries its exit code.

The exit codes are a contract (see ``README.md``): 1 a known failure, 2 wrong usage, 3 refused before any work,
4 verification failed, 5 the Hub or authentication, 130 interrupted.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

CHECK_PERMISSIONS = "check the path and its permissions"
DAMAGED_HINT = "download the file again, or point aoconvert at an intact copy"


class AoconvertError(Exception):
    """Root of all errors: one line that says what is wrong and where, and what to do next.

    Attributes:
        message: one line, no trailing full stop needed.
        hint: the next thing to do, or ``None`` where there is nothing sensible to say.
        exit_code: what the command line exits with.
        retryable: the same command can succeed later without any change: the network, a busy Hub, a stop.
        problems: everything that is wrong, one line each; for most errors the message alone.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retryable = retryable
        self.problems: tuple[str, ...] = (message,)


def _join(problems: Sequence[str]) -> str:
    """All problems in one line."""
    head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{head}: " + "; ".join(problems)


class UsageError(AoconvertError):
    """The call itself is wrong: an unknown name, options that exclude each other."""

    exit_code = 2


class UnknownSchemeError(UsageError):
    """No scheme has this name; the hint holds the nearest ones."""


class SourceError(AoconvertError):
    """The source cannot be used: missing, incomplete, damaged, or of an unknown kind. Nothing has been written."""

    exit_code = 3


class PlanError(AoconvertError):
    """The plan was refused. ``problems`` lists everything that is wrong, not only the first."""

    exit_code = 3

    def __init__(self, problems: Iterable[str], *, hint: str | None = None, retryable: bool = False) -> None:
        found = tuple(problems)
        super().__init__(_join(found), hint=hint, retryable=retryable)
        self.problems = found


class ReadError(AoconvertError):
    """Reading a tensor failed in the middle of the work (a damaged file, a disk error)."""


class WriteError(AoconvertError):
    """Writing the result failed (disk full, no permission). What is finished stays for the next run."""


class QuantizeError(AoconvertError):
    """torchao could not quantize a tensor that the plan said it could."""


class DeviceError(QuantizeError):
    """A GPU cannot be used, or not any more. What is finished stays for the next run."""


class DeviceMemoryError(DeviceError):
    """The GPU has no memory left for a weight. What is finished stays for the next run."""


class WorkerError(AoconvertError):
    """A process that made a variant of a release died. The other variants are made."""


class HostMemoryError(AoconvertError):
    """The machine's memory, or what this process may have of it, is used up. What is finished stays."""


# what Python, torch's allocators, C++ and the dynamic linker say
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc|cannot allocate memory|failed to map segment"
    r"|can't start new thread",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came of, says that the host has no memory left."""
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None:
            return False
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM):
            return True
        if isinstance(seen, (RuntimeError, ImportError, AoconvertError)) and _NO_MEMORY.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class VerificationError(AoconvertError):
    """The written checkpoint did not pass its checks."""

    exit_code = 4


class UnsafeFileError(VerificationError):
    """A ``.bin`` file is not what torch writes, and must not be loaded: damaged, ambiguous, or hostile."""


class UnsafeZipError(UnsafeFileError):
    """The zip archive of a ``.bin`` is damaged, or two readers could see two different contents in it."""


class UnsafePickleError(UnsafeFileError):
    """The pickle of a ``.bin`` names, calls or refers to something that no checkpoint needs.

    Attributes:
        position: byte in ``data.pkl`` of the opcode it was found at; ``None`` when it is about the whole file.
    """

    def __init__(self, message: str, *, hint: str | None = None, position: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.position = position


class HubError(AoconvertError):
    """The Hugging Face Hub said no, or could not be reached."""

    exit_code = 5


class HubRefusal(HubError):
    """The Hub would refuse. ``problems`` lists everything that is wrong, not only the first."""

    def __init__(self, problems: Iterable[str], *, hint: str | None = None) -> None:
        found = tuple(problems)
        super().__init__(_join(found), hint=hint)
        self.problems = found


class Interrupted(AoconvertError):
    """Ctrl-C or SIGTERM. What is finished stays for the next run."""

    exit_code = 130

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint, retryable=True)
