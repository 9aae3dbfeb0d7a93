"""Host memory: a predictable allocator, and the peak of this process."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

from aoconvert import accelerators

_M_MMAP_THRESHOLD = -3  # glibc malloc.h
_M_TRIM_THRESHOLD = -1
# The temporaries of a block of rows are smaller: mapped anew for each, NVFP4 takes a tenth longer
_BIG = 8 << 20
_SPARE = 64 << 20


def steady_allocator() -> None:
    """Make glibc give large buffers back to the system as soon as they are freed.

    By default it raises its mmap threshold with every freed buffer (up to 32 MiB) and keeps what it frees in arenas:
    the process then grows by the size of the output although nothing is referenced. Does nothing on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _BIG)
        libc.mallopt(_M_TRIM_THRESHOLD, _SPARE)


def peak_host_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux: ``VmHWM``; what ``getrusage`` gives there starts at the size of the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: str) -> int:
    """Largest number of bytes of tensors on ``device`` so far; 0 for the CPU."""
    return 0 if device == "cpu" else accelerators.peak_bytes(device)
