"""Everything that is asked of a GPU's driver, by calls that serve CUDA and XPU alike where torch has them.

Nothing else in this package calls ``torch.cuda``, ``torch.xpu``, ``torch.accelerator`` or ``torch.Stream``. torch is
imported when a function needs it.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

KINDS = ("cuda", "xpu")

# What does not come as torch.OutOfMemoryError: the driver, when it loads a kernel's code or makes a stream; oneAPI
_FULL = re.compile(r"out[ _]of[ _](\w+[ _])?memory|ALLOC_FAILED", re.IGNORECASE)


def count(kind: str) -> int:
    """How many devices of a kind torch sees."""
    import torch

    module = torch.cuda if kind == "cuda" else torch.xpu
    return module.device_count() if module.is_available() else 0


def name(device: str) -> str:
    """The model, such as ``NVIDIA H100 80GB HBM3``."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.xpu.get_device_name(device)


def capability(device: str) -> tuple[int, int] | None:
    """CUDA's compute capability; ``None`` where there is no such thing. AMD's (9, 0) is another thing than NVIDIA's."""
    import torch

    nvidia = device.startswith("cuda") and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else None


def show_one(kind: str, index: int) -> dict[str, str]:
    """Environment variables with which a process sees one device of those that this one sees, as its first.

    Sources: CUDA's programming guide; the HIP documentation, "GPU isolation"; oneAPI Level Zero's programming guide.
    """
    import torch

    amd = kind == "cuda" and torch.version.hip is not None
    variable = "HIP_VISIBLE_DEVICES" if amd else "CUDA_VISIBLE_DEVICES" if kind == "cuda" else "ZE_AFFINITY_MASK"
    seen = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    return {variable: seen[index] if index < len(seen) else str(index)}


def failure(device: str) -> str | None:
    """Use a device for the first time: a sum in float64, which the error figures are made of.

    Returns:
        Why it cannot be used, in one line; ``None`` where it can. A GPU that is seen may be full, taken by another
        process that wants it alone, or without float64 (Intel Arc A).
    """
    import torch

    try:
        one = torch.ones(1, dtype=torch.float64, device=device)
        float(one + one)
    except (RuntimeError, AssertionError) as error:  # torch's own are RuntimeErrors; a build without CUDA asserts
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def new_stream(device: torch.device) -> torch.Stream:
    """A queue of work on a device; ``with`` it, torch puts work on it."""
    import torch

    return torch.Stream(device)


def page_locked(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Host memory that a GPU copies to and from while both work; ordinary memory where the system gives no more of it.

    Copies from and to either are asynchronous for the caller, who has to wait for the stream.
    """
    import torch

    try:
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        _log.debug("no page-locked memory: %s", error)
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


def give_back(device: torch.device) -> None:
    """Wait for a device, and give back what torch keeps of its memory for this process."""
    import torch

    torch.accelerator.synchronize(device)
    torch.accelerator.empty_cache()


def peak_bytes(device: str) -> int:
    """Most bytes of tensors that were on a device at once so far."""
    import torch

    return int(torch.accelerator.max_memory_allocated(torch.device(device)))


def free_bytes(device: str) -> int:
    """Bytes that the driver can still give on a device."""
    import torch

    module = torch.cuda if device.startswith("cuda") else torch.xpu
    free, _ = module.mem_get_info(torch.device(device))
    return int(free)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None
    )
