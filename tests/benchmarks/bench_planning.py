"""Plans every variant of ``manifests/releases`` in one process, as ``release --dry-run`` does, on models without data.

    python tests/benchmarks/bench_planning.py [--apart]

``--apart`` plans each variant by itself, with nothing shared. Prints seconds (wall, and of this process's CPU) and how
often the weights files were opened. aoconvert's cache is not used.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
os.environ["AOCONVERT_CACHE_DIR"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

from helpers.opened import opened_files  # noqa: E402
from helpers.published import copy_published, read_weights  # noqa: E402

from aoconvert.options.release import ReleaseOptions  # noqa: E402
from aoconvert.releasing.release_file import load  # noqa: E402
from aoconvert.releasing.variants import list_variants, plan_variants  # noqa: E402


def main() -> None:
    """Plan, and print a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apart", action="store_true", help="share nothing between variants")
    apart = parser.parse_args().apart
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in read_weights():
            copy_published(name, root)
        print("| file | variants | wall s | CPU s | weights files | opened |\n|---|---|---|---|---|---|")
        total = [0.0, 0.0]
        count = 0
        for path in sorted((TESTS.parent / "manifests" / "releases").glob("*.toml")):
            found = load(path)
            options = ReleaseOptions(owner="org", output_root=root / "out")
            variants = list_variants(Path(shutil.copy(path, root)), found, options)
            began, busy = time.perf_counter(), time.process_time()
            with opened_files() as files:
                for group in [[each] for each in variants] if apart else [variants]:
                    plan_variants(group, options, lambda each: None, elsewhere=True)
                source = str(root / variants[0].model.source)
                weights = {name: n for name, n in files.items() if name.startswith(source) and _is_weights(name)}
            seconds = time.perf_counter() - began, time.process_time() - busy
            total = [sum(pair) for pair in zip(total, seconds, strict=True)]
            count += len(variants)
            opened = f"{len(weights)} | {sum(weights.values())}"
            print(f"| {path.stem} | {len(variants)} | {seconds[0]:.1f} | {seconds[1]:.1f} | {opened} |", flush=True)
        print(f"| all | {count} | {total[0]:.1f} | {total[1]:.1f} | | |")


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


if __name__ == "__main__":
    main()
