"""The program that compiles a kernel (``python -m aoconvert.kernels.compile FOLDER KEY < request.json``).

It runs as a child process, so that the compiler's memory and seconds never burden the converting process: torchao's own
quantization of a block of rows is traced with symbolic sizes, together with the error figures, and AOTInductor makes a
shared library of it. ``emulate_precision_casts`` keeps every rounding that eager does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aoconvert.environment import import_torchao
from aoconvert.schemes.apply import flatten, quantize_with
from aoconvert.schemes.tensors import dequantize

_LIMIT_S = 600
_ROWS = 96  # of the example that is traced; the sizes themselves stay symbolic


def main() -> None:
    """Compile what standard input asks for; the library appears in the folder under its name, or not at all."""
    folder, key = Path(sys.argv[1]), sys.argv[2]
    os.nice(10)
    signal.alarm(_LIMIT_S)  # ends this process even if nobody is left to do so
    with contextlib.suppress(OSError):  # memory short: this process goes first, not the converting one
        Path("/proc/self/oom_score_adj").write_text("1000")
    request = json.load(sys.stdin)
    import_torchao()
    from torchao.core.config import config_from_dict

    config = config_from_dict(request["config"])
    source, base = (getattr(torch, request[name]) for name in ("source", "base"))
    with tempfile.TemporaryDirectory() as scratch:
        library = build(config, request["group_size"], source, base, Path(scratch), folder)
    # the name holds the content's digest: a damaged library would kill the process that loads it
    finished = folder / f"{key}.{hashlib.sha256(library).hexdigest()}.so"
    unfinished = folder / f"{key}.{os.getpid()}.tmp"
    unfinished.write_bytes(library)
    unfinished.replace(finished)


def build(
    config: Any, group_size: int | None, source: torch.dtype, base: torch.dtype, scratch: Path, tools: Path
) -> bytes:
    """The shared library that quantizes rows of dtype ``source`` cast to ``base``; see :func:`graph`."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor import config as inductor
    from torch.export import Dim, export

    torch.set_num_threads(1)
    inductor.emulate_precision_casts = True
    inductor.cpp.dynamic_threads = True
    # 70 MB each on the disk, and slower than reading the headers twice
    inductor.cpp_cache_precompile_headers = False
    inductor.aot_inductor.precompile_headers = False
    compiler = _vectorize(os.environ.get("CXX", "g++"), tools)
    inductor.cpp.cxx = (None, compiler)
    columns = 6 * (group_size or 64)
    example = torch.linspace(-1, 1, _ROWS * columns).reshape(_ROWS, columns).to(source)
    with torch.no_grad():
        module = _Module(graph(config, base, example))
        sizes = {"rows": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
        program = export(module, (example,), dynamic_shapes=sizes, strict=False)
        package = aoti_compile_and_package(program, package_path=str(scratch / "kernel.pt2"))
    with zipfile.ZipFile(package) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".so")]
        return archive.read(name)


def graph(config: Any, base: torch.dtype, example: torch.Tensor) -> torch.fx.GraphModule:
    """Trace what one call does, as a plain aten graph with symbolic sizes (``GRAPH_VERSION`` in ``library`` counts it).

    Input: rows in the source's dtype. Output: the inner tensors of torchao's quantized rows, then for every row Σw² and
    Σ(w − dequantized)² in float64 and max |w − dequantized| in float32; the differences are float32.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantized = quantize_with(rows.to(base), config)
        names, _ = flatten(quantized)
        weight = rows.to(torch.float32)
        difference = weight - dequantize(quantized)
        wide, narrow = weight.to(torch.float64), difference.to(torch.float64)
        figures = ((wide * wide).sum(1), (narrow * narrow).sum(1), difference.abs().amax(1))
        return (*(getattr(quantized, name) for name in names), *figures)

    traced = make_fx(quantize, tracing_mode="symbolic")(example)
    # the bare linear layer's weight on meta: unused, and inductor has no backend for it
    for node in reversed(list(traced.graph.nodes)):
        if node.op == "call_function" and not node.users:
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


class _Module(torch.nn.Module):
    """A traced function as ``torch.export`` takes it."""

    def __init__(self, traced: Callable[..., Any]) -> None:
        super().__init__()
        self._traced = traced

    def forward(self, rows: torch.Tensor) -> Any:
        """One call of the graph."""
        return self._traced(rows)


def _vectorize(compiler: str, folder: Path) -> str:
    """A command that calls GCC with its loop vectorizer, which inductor switches off.

    Inductor's own vectors convert float32 to float64 in a plain loop of 16: without it the sums of squares take three
    times as long. No result changes: GCC reorders no floating-point operation here. The command's path is always the
    same, because it is part of inductor's cache key.
    """
    path = shutil.which(compiler)
    if path is None or not re.search(r"(gcc|g\+\+)", compiler) or "clang" in compiler:
        return compiler
    command = folder / f"g++-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    unfinished = folder / f"{command.name}.{os.getpid()}.tmp"
    unfinished.write_text(f'#!/bin/sh\nexec "{path}" "$@" -ftree-loop-vectorize\n')
    unfinished.chmod(0o700)
    unfinished.replace(command)
    return str(command)


if __name__ == "__main__":
    main()
