"""Runs in a fresh interpreter, without aoconvert: opens a model, runs it, and says what that took.

Reads one JSON request from stdin: ``code`` (which leaves ``pipe`` or ``model``), ``device``, ``part`` (the model in a
pipeline that is fused, compiled and measured), ``measure`` (see ``workloads.py``), ``fuse``, ``compile``,
``offload``, ``runs``, and what the workload takes: ``batch_size``, ``tokens``, ``steps``, ``size``, ``frames``,
``folder``. Writes JSON lines: ``{"threads": ...}``, ``{"model_bytes": ...}``, ``{"unit", "workload"}``, and then the
figures, or ``{"error": ...}``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SEQUENTIAL = "enable_sequential_cpu_offload"
_OFFLOADING = {"model": "enable_model_cpu_offload", "sequential": _SEQUENTIAL, "vae-tiling": "enable_vae_tiling"}


def main() -> None:
    """Answer the request on stdin; what the checkpoint's own code prints is kept off the answers."""
    request = json.load(sys.stdin)
    # an empty folder: what an earlier process compiled must not make this one quicker
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path.cwd() / "compiled")
    os.environ["TRITON_CACHE_DIR"] = str(Path.cwd() / "triton")
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer(request)
        except Exception as error:  # whatever the libraries raise
            say({"error": first_line(error)})


def answer(request: dict[str, Any]) -> None:
    """Open the model, put it into the mode that is asked for, and measure."""
    whole = open_model(request["code"])
    part = getattr(whole, request["part"]) if request["part"] else whole
    say({"threads": torch.get_num_threads()})
    if request["fuse"]:
        fuse(part)
    say({"model_bytes": count_bytes(whole)})
    if request["offload"] is not None:
        offload(whole, request["offload"], request["device"])
    workload = sibling("workloads").make(whole, part, request)
    say({"unit": workload.unit, "workload": workload.described})
    if request["compile"]:  # not before: what compiling takes belongs to the warm-up
        part.compile()
    say(measure(workload, request["device"], runs=request["runs"], warm_ups=2 if request["compile"] else 1))


def open_model(code: str) -> Any:
    """What the code leaves."""
    names: dict[str, Any] = {}
    try:
        exec(compile(code, "<load code>", "exec"), names)
    except Exception as error:
        raise RuntimeError(f"it cannot be opened: {first_line(error)}") from None
    return names.get("pipe", names.get("model"))


def fuse(model: Any) -> None:
    """Fuse the attention's projections as diffusers does; its old ones stay in the model.

    Raises:
        RuntimeError: nothing was fused, or diffusers refuses.
    """
    before = {name for name, _ in model.named_modules()}
    try:
        model.fuse_qkv_projections()
    except Exception as error:
        raise RuntimeError(f"fuse_qkv_projections: {first_line(error)}") from None
    if before == {name for name, _ in model.named_modules()}:
        raise RuntimeError(f"fuse_qkv_projections finds nothing to fuse in {type(model).__name__}")


def offload(pipe: Any, mode: str, device: str) -> None:
    """Switch an offload mode of diffusers on.

    Raises:
        RuntimeError: it cannot be.
    """
    name = _OFFLOADING[mode]
    try:
        if mode == "vae-tiling":
            (pipe.vae.enable_tiling if hasattr(pipe, "vae") else pipe.enable_vae_tiling)()
        elif device == "cpu" and torch.accelerator.is_available():
            raise ValueError("it moves models to a GPU, and the device is the CPU")
        else:
            getattr(pipe, name)(**({} if device == "cpu" else {"device": device}))
    except Exception as error:
        raise RuntimeError(f"{name}: {first_line(error)}") from None


def count_bytes(whole: Any) -> int:
    """Bytes of all parameters and buffers: inner tensors counted, and what several names share counted once."""
    models = [whole] if isinstance(whole, torch.nn.Module) else whole.components.values()
    found: dict[Any, int] = {}
    for model in (one for one in models if isinstance(one, torch.nn.Module)):
        for tensor in (*model.parameters(), *model.buffers()):
            for inner in plain_tensors(tensor.data):
                found[inner.device, inner.data_ptr(), inner.shape, inner.dtype] = inner.numel() * inner.element_size()
    return sum(found.values())


def plain_tensors(tensor: Any) -> list[torch.Tensor]:
    """The tensors that a quantized one consists of, or itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [plain for name in flatten()[0] for plain in plain_tensors(getattr(tensor, name))]


def measure(workload: Any, device: str, *, runs: int, warm_ups: int) -> dict[str, Any]:
    """Run, and say how long a run took, and how much memory.

    A workload gives the seconds that count, which may be a part of a run.
    """
    torch.manual_seed(0)
    warm = [wall_time(workload.run)[1] for _ in range(warm_ups)]
    peak = watch_peak(device)
    timed = [wall_time(workload.run) for _ in range(runs)]
    used = peak()
    seconds = sorted(found for found, _ in timed)
    usual = statistics.median(wall for _, wall in timed)
    return {
        "peak_bytes": used,
        "seconds": statistics.median(seconds),
        "seconds_min": seconds[0],
        "seconds_max": seconds[-1],
        "per_second": workload.units / statistics.median(seconds),
        "compile_seconds": sum(max(0.0, wall - usual) for wall in warm) if warm_ups > 1 else None,
    }


def wall_time(run: Callable[[], float]) -> tuple[float, float]:
    """What a run says that it took, and what it took altogether."""
    began = time.perf_counter()
    with torch.no_grad():
        counted = run()
    return counted, time.perf_counter() - began


def watch_peak(device: str) -> Callable[[], int | None]:
    """Begin to watch the memory; what is returned says the most that there was since.

    On a CPU that is the resident set of this process, by proc_pid_status(5): ``VmHWM``, which ``clear_refs`` sets back.
    """
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats(torch.device(device))
        return lambda: int(torch.accelerator.max_memory_allocated(torch.device(device)))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_peak


def resident_peak() -> int | None:
    """``VmHWM``; ``None`` where the system has no such thing."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def first_line(error: BaseException) -> str:
    """The class and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if type(error) is RuntimeError else f"{type(error).__name__}: {lines[0]}"


def sibling(name: str) -> Any:
    """A module beside this one; an isolated interpreter does not look here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def say(value: dict[str, Any]) -> None:
    """One line of the answer, also while what is printed is kept off it."""
    sys.__stdout__.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
