"""Compiled kernels: torchao's own quantization of a block of rows, with its error figures, in one pass on the CPU.

A kernel is a shared library that AOTInductor made in a child process (:mod:`.compile`) and that lies in a cache
on disk. It is called through the C interface that every such library exports (torch's ``aoti_runtime/interface.h``),
by ctypes, because that releases the interpreter's lock: torch's own loader does not, and would stall the reader and
the writer. It needs no import of dynamo or inductor. Whatever goes wrong here, there is just no kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aoconvert import cache
from aoconvert.environment import version_of
from aoconvert.formats.dtypes import dtype_name

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

_log = logging.getLogger(__name__)

# Part of a kernel's key: to be raised whenever the graph that compile.py makes, or how it compiles it, changes
GRAPH_VERSION = 1
_FIGURES = 3
_BUILD_LIMIT_S = 300


@dataclass(frozen=True)
class Rows:
    """Quantized rows and their error.

    Attributes:
        parts: torchao's inner tensors in ``__tensor_flatten__`` order, for these rows.
        signal: Σ w², float64.
        noise: Σ (w − dequantized)² of float32 differences, float64.
        largest: max |w − dequantized|.
    """

    parts: tuple[torch.Tensor, ...]
    signal: float
    noise: float
    largest: float


class Kernel:
    """A loaded library.

    Raises:
        OSError, AttributeError, RuntimeError: the file is no such library, or does not run here.
    """

    def __init__(self, path: Path) -> None:
        # private to torch, of its versions 2.11 to 2.13 at least
        self._handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
        self._tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
        self._library = ctypes.CDLL(str(path))
        self._container = ctypes.c_void_p()
        self._call("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None)
        count = ctypes.c_size_t()
        self._call("GetNumOutputs", self._container, ctypes.byref(count))
        self._outputs = count.value

    def rows(self, block: torch.Tensor) -> Rows:
        """Quantize rows.

        Args:
            block: (rows, in_features), contiguous, on the CPU, in the source's dtype; :func:`fits` says what else.

        Raises:
            RuntimeError: the library failed.
        """
        inputs = (ctypes.c_void_p * 1)(*(_pointer(item) for item in self._handles([block.detach()])))
        outputs = (ctypes.c_void_p * self._outputs)()
        one, many = ctypes.c_size_t(1), ctypes.c_size_t(self._outputs)
        self._call("Run", self._container, inputs, one, outputs, many, None, None)
        tensors = self._tensors([_capsule(item) for item in outputs])
        signal_, noise, largest = tensors[-_FIGURES:]
        return Rows(tuple(tensors[:-_FIGURES]), float(signal_.sum()), float(noise.sum()), float(largest.max()))

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, f"AOTInductorModelContainer{name}")(*arguments):
            raise RuntimeError(f"AOTInductorModelContainer{name} failed")


def _pointer(capsule: Any) -> int:
    """The address in a PyCapsule without a name, as torch hands tensors out."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return int(get(capsule, None))


def _capsule(address: int | None) -> Any:
    """The reverse, as torch takes tensors back."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(address, None, None)


def fits(weight: torch.Tensor, scheme: Scheme) -> bool:
    """Whether a kernel may be called on it: it was traced for two rows and columns or more, and for whole groups."""
    rows, columns = weight.shape
    whole = columns % (scheme.group_size or 1) == 0
    return rows > 1 and columns > 1 and whole and weight.is_contiguous() and weight.device.type == "cpu"


def get(scheme: Scheme, source: torch.dtype, base: torch.dtype) -> Kernel | None:
    """The kernel out of the cache; ``None`` where there is none, or it may not be used. Never raises."""
    place = cache.folder("kernels")
    if place is None:
        return None
    try:
        return _load(place, _key(scheme, source, base))
    except OSError as error:
        _log.debug("kernel cache: %s", error)
        return None


def _load(folder: Path, key: str) -> Kernel | None:
    """Load a library whose bytes are those that were compiled; whatever else has its name is removed."""
    for path in sorted(folder.glob(f"{key}.*.so")):
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() == path.name.split(".")[1]:
                return Kernel(path)
            problem = "it is damaged"
        except (OSError, AttributeError, RuntimeError) as error:
            problem = str(error)
        _log.debug("kernel %s is removed: %s", path.name, problem)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _key(scheme: Scheme, source: torch.dtype, base: torch.dtype) -> str:
    """Everything that a library depends on, as a file name."""
    facts = {
        "graph": GRAPH_VERSION,
        "torch": [torch.__version__, torch.version.git_version],
        "torchao": version_of("torchao"),
        "config": scheme.config_dict,
        "dtypes": [str(source), str(base)],
        "processor": _processor(),
    }
    return cache.key(facts)


@functools.cache
def _processor() -> list[str]:
    """The instructions that this processor has; the compiler uses all of them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return sorted(value.split())
    return [torch.backends.cpu.get_cpu_capability()]


class Building:
    """A kernel that a child process is compiling. Nothing here raises: what fails gives no kernel."""

    def __init__(self, scheme: Scheme, source: torch.dtype, base: torch.dtype) -> None:
        self._key = _key(scheme, source, base)
        self._folder = cache.folder("kernels")
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        request = {
            "config": scheme.config_dict,
            "group_size": scheme.group_size,
            "source": dtype_name(source),
            "base": dtype_name(base),
        }
        try:
            if self._folder is None:
                _log.debug("no kernel: no cache is available")
            elif (compiler := shutil.which(os.environ.get("CXX", "g++"))) is None:
                _log.debug("no kernel: no compiler is installed")
            else:
                _log.debug("compiling a kernel for %s with %s", scheme.name, compiler)
                self._start(json.dumps(request).encode())
        except OSError as error:
            _log.debug("no kernel: %s", error)

    def _start(self, request: bytes) -> None:
        with tempfile.TemporaryFile() as standard_input:
            standard_input.write(request)
            standard_input.seek(0)
            self._process = subprocess.Popen(
                # -P: no module of the current folder is imported
                [sys.executable, "-P", "-m", "aoconvert.kernels.compile", str(self._folder), self._key],
                stdin=standard_input,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us; and the compilers that it starts can be ended with it
                env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )

    @property
    def done(self) -> bool:
        """It has ended, one way or another."""
        if self._process is None or self._process.poll() is not None:
            return True
        if time.monotonic() - self._began > _BUILD_LIMIT_S:
            _log.debug("no kernel: the compiler took longer than %d s", _BUILD_LIMIT_S)
            self.cancel()
        return self._process is None

    def ready(self) -> Kernel | None:
        """The kernel, once it is there."""
        if not self.done or self._process is None or self._folder is None:
            return None
        if self._process.returncode:
            _log.debug("no kernel: the compiling process ended with %d", self._process.returncode)
            return None
        return _load(self._folder, self._key)

    def wait(self) -> Kernel | None:
        """The kernel, when the child has ended."""
        while not self.done:
            time.sleep(0.05)
        return self.ready()

    def cancel(self) -> None:
        """End the child and the compilers that it started."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start(scheme: Scheme, source: torch.dtype, base: torch.dtype) -> Building:
    """Start compiling in a child process of low priority."""
    return Building(scheme, source, base)
