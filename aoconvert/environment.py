"""What this process runs on: versions, the platform, the device, and imports without known noise.

No function here returns a host name, a user name or a path: all of it may go into a manifest.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from aoconvert import accelerators
from aoconvert.errors import PlanError, UsageError
from aoconvert.version import __version__

PACKAGES = ("torch", "torchao", "diffusers", "transformers", "accelerate", "huggingface_hub")
ACCELERATORS = accelerators.KINDS
# also told by ``aoconvert env``: what reads and writes files, and what some layouts or models need
_BESIDE = ("safetensors", "tokenizers", "hf_xet", "peft", "mslk", "triton")
_VARIABLES = (
    *("AOCONVERT_CACHE_DIR", "AOCONVERT_COMPILE", "AOCONVERT_DEBUG", "AOCONVERT_VERIFY_MEMORY"),
    *("AOCONVERT_VERIFY_SECONDS", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE"),
)

_log = logging.getLogger(__name__)

# Logger -> how the message starts or what it holds. Each of them is harmless and printed at every import (torchao
# 0.18: extension modules for other Pythons and GPUs; torch 2.13: torchao registers an Enum; diffusers 0.42: classes
# of torchao < 0.17; transformers 5: image processors that no pipeline here calls).
_NOISE = {
    # where it is installed, diffusers imports it
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported by torch.compile",
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


@dataclass(frozen=True)
class Device:
    """A device as the manifest names it.

    Attributes:
        type: ``cpu``, ``cuda`` or ``xpu``.
        name: the model, such as ``NVIDIA H100 80GB HBM3`` or ``Intel(R) Xeon(R) Platinum 8481C``.
        capability: CUDA's compute capability, such as ``(9, 0)``; ``None`` where there is no such thing, as on AMD's.
    """

    type: str
    name: str
    capability: tuple[int, int] | None


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or ``None``. Imports nothing of it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python, aoconvert and every package that shapes the result; absent packages are left out."""
    found = {"python": platform.python_version()}
    found.update((package, version) for package in PACKAGES if (version := version_of(package)) is not None)
    return {**found, "aoconvert": __version__}


def version_at_least(package: str, minimum: str) -> bool:
    """Whether ``package`` is installed in version ``minimum`` or newer, by PEP 440 (``0.9 < 0.18``)."""
    version = version_of(package)
    return version is not None and Version(version) >= Version(minimum)


def torch_build() -> str:
    """What the installed torch was built for, by its version: ``cpu``, ``cu130``, ``xpu``, ``rocm6.4``, or nothing.

    Imports no torch.
    """
    return (version_of("torch") or "").partition("+")[2]


def available_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def platform_name() -> str:
    """Operating system, machine and C library, such as ``Linux x86_64 glibc 2.36``; no host name, no kernel build."""
    return " ".join(part for part in (platform.system(), platform.machine(), *platform.libc_ver()) if part)


def check_device_names(requested: str) -> None:
    """Whether these are names of devices, here or anywhere. Imports no torch.

    Args:
        requested: one, or several after commas; ``auto``, and ``cuda:all``, too.

    Raises:
        UsageError: one is not.
    """
    for name in requested.removesuffix(":all").split(","):
        if name.strip() != "auto":
            _split(name.strip())


def choose_device(requested: str) -> str:
    """The torch device to quantize on: ``auto`` becomes the best that is here and answers, anything else is checked.

    Args:
        requested: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``xpu`` or ``xpu:N``.

    Raises:
        UsageError: not a device name.
        PlanError: a device that this machine, or this build of torch, does not have.
    """
    if requested == "auto":
        return next(filter(_answers, _all_devices()), "cpu")
    kind, index = _split(requested)
    if kind in ACCELERATORS and (count := accelerators.count(kind)) <= (index or 0):
        here = "; ".join((_count_text(kind, count), *_cpu_build(kind)))
        raise PlanError([f"device {requested} is not available: {here}"], hint="--device auto uses what is available")
    return requested


def choose_devices(requested: str) -> tuple[str, ...]:
    """The devices that share the quantizing: one, several GPUs after commas, or with ``cuda:all`` all there are.

    Raises:
        UsageError, PlanError: as :func:`choose_device`; a CPU, or two kinds of device, among several.
    """
    if requested.endswith(":all"):
        kind = requested.removesuffix(":all")
        choose_device(kind)
        return tuple(f"{kind}:{index}" for index in range(accelerators.count(kind))) if kind != "cpu" else (kind,)
    chosen = tuple(dict.fromkeys(choose_device(name.strip()) for name in requested.split(",")))
    if len(chosen) > 1 and (len({_split(name)[0] for name in chosen}) > 1 or chosen[0] == "cpu"):
        raise UsageError(f"--device {requested}: several devices must be GPUs of one kind", hint="e.g. cuda:0,cuda:1")
    return chosen


def device_facts(device: str) -> Device:
    """What ``device`` (a name that :func:`choose_device` returned) is.

    Raises:
        UsageError, PlanError: as :func:`choose_device`.
    """
    chosen = choose_device(device)
    kind, _ = _split(chosen)
    if kind == "cpu":
        return Device("cpu", _cpu_name(), None)
    return Device(kind, accelerators.name(chosen), accelerators.capability(chosen))


def survey() -> dict[str, Any]:
    """What aoconvert would run with here, for ``aoconvert env``. Values are JSON; no token, no host name.

    Keys: ``versions`` (package → version, or null), ``platform``, ``cores``, ``memory_bytes``, ``devices`` (each with
    ``device``, ``name``, ``capability``), ``device`` (what ``--device auto`` picks), ``kernels`` (how the CPU
    quantizes), ``caches`` (name → folder, null where off), ``hub``, ``variables`` (ours that are set).
    """
    from huggingface_hub import constants, get_token

    from aoconvert import cache

    everything = (*PACKAGES, *_BESIDE)
    devices = [name for kind in ACCELERATORS for name in (f"{kind}:{i}" for i in range(accelerators.count(kind)))]
    caches = {"aoconvert": cache.root(), "Hub": Path(constants.HF_HUB_CACHE)}
    return {
        "versions": {
            "aoconvert": __version__,
            "python": platform.python_version(),
            **{package: version_of(package) for package in everything},
        },
        "platform": platform_name(),
        "cores": available_cores(),
        "memory_bytes": _memory_bytes(),
        "devices": [_device_entry(name) for name in ("cpu", *devices)],
        "device": choose_device("auto"),
        "kernels": _kernels(),
        "caches": {name: str(place) if place is not None else None for name, place in caches.items()},
        "hub": {"endpoint": constants.ENDPOINT, "token": get_token() is not None, "offline": constants.HF_HUB_OFFLINE},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _device_entry(name: str) -> dict[str, Any]:
    facts = device_facts(name)
    return {
        "device": name,
        "name": facts.name,
        "capability": list(facts.capability) if facts.capability else None,
    }


def _memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kernels() -> str:
    """Whether compiled kernels would be used on the CPU."""
    if os.environ.get("AOCONVERT_COMPILE") == "0":
        return "off (AOCONVERT_COMPILE=0)"
    compiler = os.environ.get("CXX") or "g++"
    found = shutil.which(compiler)
    return f"compiled with {found}" if found is not None else f"not compiled: {compiler} is not installed"


@contextlib.contextmanager
def host_by_default() -> Iterator[None]:
    """Make tensors without a device in host memory, whatever the caller's ``torch.set_default_device`` says.

    Imports no torch: who has not imported it has set nothing.
    """
    torch = sys.modules.get("torch")
    asked = getattr(torch, "get_default_device", None)  # not yet there while another thread imports torch
    if asked is None or asked().type == "cpu":
        yield
        return
    import torch as imported

    with imported.device("cpu"):
        yield


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop the known, harmless messages that libraries log while they are imported; keep all others."""
    filters = [(logging.getLogger(name), _Drop(text)) for name, text in _NOISE.items()]
    for logger, drop in filters:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger, drop in filters:
            logger.removeFilter(drop)


def import_torchao() -> Any:
    """``torchao`` with ``torchao.quantization``, imported without its noise.

    Raises:
        ImportError: torchao is not installed, or does not fit the installed torch.
    """
    with quiet_imports():
        import torchao
        import torchao.quantization
    return torchao


def import_diffusers() -> Any:
    """``diffusers``, with the quantizer that loads torchao checkpoints, imported without its noise.

    Raises:
        ImportError: diffusers is not installed, or does not fit what is.
    """
    with quiet_imports():
        import diffusers
        import diffusers.quantizers
    return diffusers


class _Drop(logging.Filter):
    """Refuses records whose message contains a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """False for the one message, True for everything else."""
        return self._text not in record.getMessage()


def _split(device: str) -> tuple[str, int | None]:
    """``cuda:1`` -> ``("cuda", 1)``, ``cuda`` -> ``("cuda", None)``."""
    kind, colon, number = device.partition(":")
    known = kind in ACCELERATORS or (kind == "cpu" and not colon)
    if not known or (colon and not (number.isascii() and number.isdigit())):
        raise UsageError(f"{device!r} is not a device", hint="use auto, cpu, cuda, cuda:N, xpu or xpu:N")
    return kind, int(number) if colon else None


def _all_devices() -> Iterator[str]:
    """Every GPU that torch sees, the best kind first; the first of a kind has the kind's name."""
    for kind in ACCELERATORS:
        for index in range(accelerators.count(kind)):
            yield f"{kind}:{index}" if index else kind


def _answers(device: str) -> bool:
    if (why := accelerators.failure(device)) is not None:
        _log.warning("%s is here, but it cannot be used: %s", device, why)
    return why is None


def _count_text(kind: str, count: int) -> str:
    if not count:
        return f"torch sees no {kind} device"
    return f"torch sees {count} {kind} device{'s' if count > 1 else ''}, {kind}:0 to {kind}:{count - 1}"


def _cpu_build(kind: str) -> tuple[str, ...]:
    """The commonest reason for a missing CUDA device: a torch that was built without it."""
    import torch

    no_cuda = kind == "cuda" and torch.version.cuda is None and torch.version.hip is None
    return (f"torch {torch.__version__} is built without CUDA",) if no_cuda else ()


def _cpu_name() -> str:
    """The processor's model; falls back to the machine type (``platform.processor`` is often empty on Linux)."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
