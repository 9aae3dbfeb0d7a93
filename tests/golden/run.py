"""Make the golden conversions: ``run.py`` compares them with ``results.json``, ``run.py --write`` writes that.

``--keep FOLDER`` writes the documents that are hashed there: made before and after a change, they show what differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("AOCONVERT_CACHE_DIR", "")
os.environ.setdefault("AOCONVERT_COMPILE", "0")
sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).with_name("results.json")
_PACKAGES = ("torch", "torchao", "diffusers", "transformers", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """The packages whose releases the bytes depend on, without local parts (``+cpu``)."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in _PACKAGES}


def stored() -> dict[str, Any]:
    """``versions`` and ``conversions`` as they were written last."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"versions": {}, "conversions": {}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write results.json")
    parser.add_argument("--keep", type=Path, help="folder for the documents that are hashed")
    parser.add_argument("names", nargs="*", help="only these conversions; results.json keeps the others")
    arguments = parser.parse_args()

    import torch
    from golden.conversions import CONVERSIONS, Golden, differences
    from table.run import quiet

    quiet()
    before, cpu = stored()["conversions"], torch.backends.cpu.get_cpu_capability()
    records, failed = {name: before[name] for name in CONVERSIONS if name in before}, []
    keep = arguments.keep.resolve() if arguments.keep else None
    with tempfile.TemporaryDirectory() as folder:
        golden = Golden(Path(folder), keep)
        for name in arguments.names or CONVERSIONS:
            if CONVERSIONS[name].cpu not in (None, cpu):
                print(f"         {name}: needs {CONVERSIONS[name].cpu}, this CPU has {cpu}", file=sys.stderr)
                continue
            began = time.monotonic()
            records[name] = golden.make(name)
            print(f"{time.monotonic() - began:6.1f} s {name}", file=sys.stderr, flush=True)
            wanted = before.get(name, {"files": {}, "documents": {}})
            failed += [f"{name}: {line}" for line in differences(records[name], wanted)]
    print("\n".join(failed) or "every file and document as it should be")
    if arguments.write:
        result = {"versions": versions(), "conversions": {name: records[name] for name in CONVERSIONS}}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
