"""aoconvert against the libraries' own ways to quantize and save a CogVideoX-2b transformer: wall time and peak memory.

    python tests/benchmarks/bench_quantize.py --runs 3 --scheme int8wo
    python tests/benchmarks/bench_quantize.py --runs 3 --ways aoconvert,before,floor --before CHECKOUT

Every way runs in a fresh process, in turn, so that a slow spell of the machine meets all of them; before each the
source is read once (a warm page cache for all) and older output is flushed to the disk. Peak memory is the kernel's
own figure (``wait4``). This process imports no torch: a child's figure starts at what its parent had at ``exec``.
At the end the files are compared bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
WEIGHTS = "diffusion_pytorch_model.bin"

# ---- in the children: the libraries' ways -------------------------------------------------------------------------


def _save_state_dict(model: Any, out: Path) -> None:
    import torch

    out.mkdir(parents=True)
    torch.save(model.state_dict(), out / WEIGHTS)


def _loaded(source: Path, **options: Any) -> Any:
    import torch
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel.from_pretrained(source, torch_dtype=torch.bfloat16, **options)


def by_diffusers(source: Path, out: Path, config: Any, skip: list[str], device: str) -> None:
    """``from_pretrained(quantization_config=…)`` and ``save_pretrained``."""
    from diffusers import TorchAoConfig

    place = {} if device == "cpu" else {"device_map": device}
    quantization = TorchAoConfig(config, modules_to_not_convert=skip)
    model = _loaded(source, quantization_config=quantization, **place)
    model.save_pretrained(out, safe_serialization=False)


def _quantize(source: Path, out: Path, config: Any, skip: list[str], *, load_to: str, quantize_on: str | None) -> None:
    import torch
    from torchao.quantization import quantize_

    def wanted(module: Any, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and not {name, f"{name}.weight"} & set(skip)

    model = _loaded(source).to(load_to)
    quantize_(model, config, filter_fn=wanted, device=quantize_on)
    _save_state_dict(model, out)


def by_quantize(source: Path, out: Path, config: Any, skip: list[str], device: str) -> None:
    """Load the whole model on the device, ``quantize_``, ``torch.save``."""
    _quantize(source, out, config, skip, load_to=device, quantize_on=None)


def by_quantize_device(source: Path, out: Path, config: Any, skip: list[str], device: str) -> None:
    """Load on the CPU, ``quantize_(device=…)``: one weight at a time on the GPU; ``torch.save``."""
    _quantize(source, out, config, skip, load_to="cpu", quantize_on=device)


LIBRARY_WAYS: dict[str, Callable[[Path, Path, Any, list[str], str], None]] = {
    "diffusers": by_diffusers,
    "quantize_": by_quantize,
    "quantize_(device=)": by_quantize_device,
}


def child_way(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """One of the libraries' ways; returns what only the process itself can know."""
    from aoconvert import schemes

    config = schemes.get(job["scheme"]).config
    LIBRARY_WAYS[name](Path(job["source"]), Path(job["out"]), config, job["skip"], job["device"])
    if job["device"] == "cpu":
        return {"device_peak": 0}
    import torch

    return {"device_peak": torch.cuda.max_memory_allocated()}


def child_plan(job: dict[str, Any]) -> dict[str, Any]:
    """What aoconvert decides: the modules that every way shall leave alone, and the memory that it promises."""
    import aoconvert
    from aoconvert.environment import versions

    plan = aoconvert.plan(job["source"], job["scheme"], output=job["out"], device=job["device"])
    (component,) = plan.components
    return {
        "skip": list(component.skip_modules),
        "bytes_out": sum(file.size for file in component.files),
        "parameters": sum(tensor.numel for tensor in component.tensors),
        "promised_host_peak": plan.needs.host_peak_bytes,
        "versions": versions(),
    }


def child_floor(job: dict[str, Any]) -> dict[str, Any]:
    """What no conversion can do without: a thread reads the source and hashes it, another writes and hashes as much as
    the result has, and flushes it to the disk. In plain Python, with one buffer each."""
    size = 32 << 20

    def read() -> None:
        buffer, digest = bytearray(size), hashlib.sha256()
        for path in sorted(Path(job["source"]).iterdir()):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:count])

    def write() -> None:
        buffer, digest, left = memoryview(os.urandom(size)), hashlib.sha256(), job["bytes_out"]
        with (Path(job["out"]) / WEIGHTS).open("wb", buffering=0) as file:
            while left:
                written = file.write(buffer[:left])
                digest.update(buffer[:written])
                left -= written
            os.fsync(file.fileno())

    Path(job["out"]).mkdir(parents=True)
    began = time.perf_counter()
    threads = [threading.Thread(target=work) for work in (read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"device_peak": 0, "stream": time.perf_counter() - began}


def child_compare(job: dict[str, Any]) -> dict[str, Any]:
    """Names in order, classes, attributes, and every inner tensor bit by bit; files are mapped, not loaded."""
    import torch
    import torchao.prototype.mx_formats  # noqa: F401  torchao and this register their classes for weights_only

    def load(path: str) -> dict[str, Any]:
        tensors: dict[str, Any] = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        return tensors

    def differs(left: Any, right: Any) -> str | None:
        if type(left) is not type(right):
            return f"{type(left).__name__} and {type(right).__name__}"
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return f"{left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}"
        if hasattr(left, "__tensor_flatten__"):
            (names, attributes), (others, more) = left.__tensor_flatten__(), right.__tensor_flatten__()
            if names != others or repr(attributes) != repr(more):
                return f"{names} {attributes} and {others} {more}"
            return next((f"{n}: {d}" for n in names if (d := differs(getattr(left, n), getattr(right, n)))), None)
        same = torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
        return None if same else "other bits"

    one, two = load(job["one"]), load(job["two"])
    if list(one) != list(two):
        return {"tensors": 0, "differences": [f"other names: {sorted(set(one) ^ set(two))[:3] or 'their order'}"]}
    found = [f"{name}: {why}" for name in one if (why := differs(one[name], two[name]))]
    return {"tensors": len(one), "differences": found}


def child(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Dispatch in a child process."""
    if name == "plan":
        return child_plan(job)
    if name == "compare":
        return child_compare(job)
    if name == "floor":
        return child_floor(job)
    return child_way(name, job)


# ---- in the parent: measuring -------------------------------------------------------------------------------------


def spawn(command: list[str], log: Path, package: Path = REPO) -> tuple[dict[str, float], str]:
    """Run a command to its end: seconds, peak bytes, CPU seconds; and its standard output.

    Raises:
        SystemExit: it failed; its standard error is shown.
    """
    environment = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"}
    with log.with_suffix(".out").open("w+") as out, log.with_suffix(".err").open("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"failed ({process.returncode}): {' '.join(command)}\n{err.read()[-3000:]}")
        unit = 1 if sys.platform == "darwin" else 1024
        figures = {
            "seconds": seconds,
            "host_peak": usage.ru_maxrss * unit,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }
        return figures, out.read()


def run_child(name: str, job: dict[str, Any], workdir: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Run ``child`` in its own process."""
    figures, out = spawn([sys.executable, __file__, "--child", name, json.dumps(job)], workdir / "child")
    return figures, json.loads(out.splitlines()[-1])


def run_aoconvert(job: dict[str, Any], workdir: Path, package: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The command line, as a user runs it, of the package in a checkout."""
    command = [sys.executable, "-m", "aoconvert", "quantize", job["source"], "--scheme", job["scheme"]]
    command += ["--device", job["device"], "--output", job["out"], "--json"]
    figures, out = spawn(command, workdir / "aoconvert", package)
    run = json.loads((Path(job["out"]) / "aoconvert.json").read_text())["run"]
    stages = {name: run[f"{name}_seconds"] for name in ("reader", "quantize", "writer")}
    return figures, {"device_peak": json.loads(out)["peak_device_bytes"], "stream": run["seconds"], **stages}


def run_copy(job: dict[str, Any], workdir: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The floor: read the source and write as much."""
    figures, _ = spawn(["cp", "-r", "--reflink=never", job["source"], job["out"]], workdir / "cp")
    return figures, {"device_peak": 0}


def settle(source: Path) -> None:
    """The same start for everyone: nothing left to write back, the source in the page cache."""
    os.sync()
    buffer = bytearray(1 << 22)
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def run_way(way: str, job: dict[str, Any], workdir: Path) -> dict[str, float]:
    """One timed run of a way."""
    shutil.rmtree(job["out"], ignore_errors=True)
    settle(Path(job["source"]))
    if way == "aoconvert":
        figures, more = run_aoconvert(job, workdir, REPO)
    elif way == "before":
        figures, more = run_aoconvert(job, workdir, Path(job["before"]))
    elif way == "cp":
        figures, more = run_copy(job, workdir)
    else:
        figures, more = run_child(way, job, workdir)
    written = sum(path.stat().st_size for path in Path(job["out"]).iterdir())
    return {**figures, **more, "written": written, "load": os.getloadavg()[0]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs of all ways, and the comparison."""
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    source: Path = options.source or workdir / f"cogvideox-{options.layers}"
    if not (source / "config.json").is_file():
        figures, _ = spawn(
            [sys.executable, str(HERE / "models.py"), "--layers", str(options.layers), str(source)], source
        )
        print(f"built {source} in {figures['seconds']:.0f} s, peak {mega(figures['host_peak'])}", flush=True)
    job = {"source": str(source), "scheme": options.scheme, "device": options.device, "skip": []}
    _, plan = run_child("plan", {**job, "out": str(workdir / "planned")}, workdir)
    job |= {"skip": plan["skip"], "bytes_out": plan["bytes_out"], "before": str(options.before)}
    ways = ["aoconvert", *(["before"] if options.before else []), "diffusers", "quantize_", "floor", "cp"]
    if options.device != "cpu":
        ways.insert(-2, "quantize_(device=)")
    ways = [way for way in ways if options.ways is None or way in options.ways.split(",")]
    places = {way: workdir / f"out-{number}" for number, way in enumerate(ways)}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(options.runs):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            found = run_way(way, {**job, "out": str(places[way])}, workdir)
            runs[way].append(found)
            line = f"{found['seconds']:6.1f} s {mega(found['host_peak']):>9} load {found['load']:.1f}"
            print(f"run {turn + 1} {way:18} {line}", flush=True)
    same = {}
    for way in [way for way in ways if way in LIBRARY_WAYS or way == "before"]:
        pair = {"one": str(places["aoconvert"] / WEIGHTS), "two": str(places[way] / WEIGHTS)}
        same[way] = run_child("compare", pair, workdir)[1]
    for place in places.values():
        shutil.rmtree(place, ignore_errors=True)
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d %H:%M")}
    return {"machine": machine, "scheme": options.scheme, "device": options.device, **plan, "runs": runs, "same": same}


def mega(count: float) -> str:
    """Bytes for a table."""
    return f"{count / 1e6:,.0f} MB"


def table(result: dict[str, Any]) -> str:
    """A Markdown table: medians, min–max, and aoconvert's share of each way."""
    runs = result["runs"]

    def middle(way: str, key: str) -> float:
        return float(statistics.median(run[key] for run in runs[way]))

    def spread(way: str, key: str, scale: float, digits: int) -> str:
        values = sorted(run[key] / scale for run in runs[way])
        return f"{middle(way, key) / scale:.{digits}f} ({values[0]:.{digits}f}–{values[-1]:.{digits}f})"

    gpu = result["device"] != "cpu"
    head = ["way", "wall s", "CPU s", "peak RSS MB", *(["peak GPU MB"] if gpu else []), "written MB"]
    head += ["aoconvert/this: wall", "RSS", *(["GPU"] if gpu else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for way in runs:
        cells = [way, spread(way, "seconds", 1, 1), spread(way, "cpu_seconds", 1, 1), spread(way, "host_peak", 1e6, 0)]
        cells += [spread(way, "device_peak", 1e6, 0)] if gpu else []
        cells.append(f"{middle(way, 'written') / 1e6:.0f}")
        for key in ("seconds", "host_peak", *(["device_peak"] if gpu else [])):
            other = middle(way, key)
            cells.append(f"{middle('aoconvert', key) / other:.2f}" if other and way != "aoconvert" else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def streaming(result: dict[str, Any]) -> str:
    """The streaming phase, first byte read to the manifest, against the floor."""
    ours = result["runs"]["aoconvert"]
    seconds, floor = (statistics.median(run["stream"] for run in result["runs"][way]) for way in ("aoconvert", "floor"))
    stages = ", ".join(
        f"{name} {statistics.median(run[name] for run in ours):.1f}" for name in ("reader", "quantize", "writer")
    )
    return (
        f"streaming: {seconds:.1f} s ({stages} s at work); the floor takes {floor:.1f} s, "
        f"which is {floor / seconds:.2f} of that"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of every way; the table has medians")
    parser.add_argument("--layers", type=int, default=30, help="of the model; 30 is CogVideoX-2b")
    parser.add_argument("--scheme", default="int8wo", help="any scheme of aoconvert")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workdir", type=Path, default=Path("bench-work"), help="for the model and the results")
    parser.add_argument("--ways", help="only these, separated by commas; aoconvert must be among them")
    parser.add_argument("--before", type=Path, help="a checkout of another version, which is measured in turn as well")
    parser.add_argument("--source", type=Path, help="a CogVideoX transformer that is there already")
    parser.add_argument("--json", type=Path, help="file for every single figure")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "JOB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], json.loads(options.child[1]))))
        return 0
    result = measure(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['scheme']} on {result['device']}, {result['parameters'] / 1e9:.2f} billion parameters")
    print(table(result))
    peak = statistics.median(run["host_peak"] for run in result["runs"]["aoconvert"])
    print(
        f"the plan promised {mega(result['promised_host_peak'])}, {result['promised_host_peak'] / peak:.2f} of the peak"
    )
    if "floor" in result["runs"]:
        print(streaming(result))
    failed = False
    for way, found in result["same"].items():
        failed |= bool(found["differences"])
        verdict = "; ".join(found["differences"][:5]) or f"all {found['tensors']} tensors are bit for bit the same"
        print(f"aoconvert and {way}: {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
