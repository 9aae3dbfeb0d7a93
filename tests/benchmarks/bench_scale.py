"""Time and memory of ``aoconvert quantize`` against the size of the model: a line, and flat.

    python tests/benchmarks/bench_scale.py --workdir bench-work --runs 3

CogVideoX transformers of real width, 0.5 to 8 GB in bfloat16, each converted in a fresh process; the least squares line
through the medians, its R², and the spread of the peak resident sets. Times need a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from bench_quantize import HERE, mega, run_aoconvert, settle, spawn

LAYERS = (4, 9, 18, 36, 72)  # 0.5, 1, 2, 4 and 8 GB


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Intercept, slope and R² of the least squares line."""
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    start = mean_y - slope * mean_x
    rest = sum((y - start - slope * x) ** 2 for x, y in points)
    return start, slope, 1 - rest / sum((y - mean_y) ** 2 for _, y in points)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scheme", default="int8wo")
    parser.add_argument("--workdir", type=Path, default=Path("bench-work"))
    options = parser.parse_args()
    workdir: Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for layers in LAYERS:
        source, out = workdir / f"scale-{layers}", workdir / "scale-out"
        spawn([sys.executable, str(HERE / "models.py"), "--layers", str(layers), str(source)], source)
        size = sum(path.stat().st_size for path in source.iterdir())
        found = []
        for _ in range(options.runs + 1):
            shutil.rmtree(out, ignore_errors=True)
            settle(source)
            job = {"source": str(source), "scheme": options.scheme, "device": "cpu", "out": str(out)}
            figures, _ = run_aoconvert(job, workdir)
            found.append({**figures, "stream": json.loads((out / "aoconvert.json").read_text())["run"]["seconds"]})
        # the first run of each size also builds the model; later ones remember what it is made of
        row = {key: statistics.median(run[key] for run in found[1:]) for key in ("seconds", "stream", "host_peak")}
        rows.append((size / 1e9, row))
        print(
            f"{size / 1e9:5.2f} GB {row['seconds']:6.1f} s, streaming {row['stream']:5.1f} s, {mega(row['host_peak'])}",
            flush=True,
        )
        shutil.rmtree(source)
    shutil.rmtree(out, ignore_errors=True)
    for key in ("seconds", "stream"):
        start, slope, square = fit([(size, row[key]) for size, row in rows])
        print(f"{key}: {start:.1f} s + {slope:.2f} s/GB, R² {square:.4f}")
    peaks = [row["host_peak"] for _, row in rows]
    print(f"peaks: {mega(min(peaks))} to {mega(max(peaks))}, {max(peaks) / min(peaks):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
