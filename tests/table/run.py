"""Make the whole table: ``python tests/table/run.py`` compares it with ``results.json``, ``--write`` writes that."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("AOCONVERT_CACHE_DIR", "")
os.environ.setdefault("AOCONVERT_COMPILE", "0")
sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).with_name("results.json")


def stored() -> dict[str, dict[str, dict[str, object]]]:
    """Row -> family -> cell, as the last whole run left it."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]


def quiet() -> None:
    """No progress bars, and nothing about .bin files."""
    from helpers import tiny

    for library in (tiny.diffusers, tiny.transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write results.json")
    parser.add_argument("rows", nargs="*", help="only these schemes; results.json keeps the others")
    arguments = parser.parse_args()

    import torch
    import torchao
    from table.cells import FAMILIES, ROWS, Table

    quiet()
    before = stored() if RESULTS.is_file() else {}
    cells = {row: dict(before[row]) for row in ROWS if row in before}
    began, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        table = Table(Path(folder))
        for row in arguments.rows or ROWS:
            cells[row] = {}
            for family in FAMILIES:
                try:
                    cells[row][family] = table.cell(row, family)
                except Exception as error:
                    failed.append(f"{row} {family}: {type(error).__name__}: {error}".splitlines()[0])
            print(f"{time.monotonic() - began:6.0f} s  {row}", file=sys.stderr, flush=True)
    failed += [f"{row} differs" for row in cells if not arguments.write and cells[row] != before.get(row)]
    print("\n".join(failed) or "every cell as it should be")
    if arguments.write and not failed:
        versions = {"torch": torch.__version__.partition("+")[0], "torchao": torchao.__version__.partition("+")[0]}
        lines = [
            f'  "{row}": {{\n'
            + ",\n".join(f'   "{key}": {json.dumps(cell)}' for key, cell in columns.items())
            + "\n  }"
            for row, columns in ((row, cells[row]) for row in ROWS if row in cells)
        ]
        text = f'{{\n "versions": {json.dumps(versions)},\n "cells": {{\n' + ",\n".join(lines) + "\n }\n}\n"
        RESULTS.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
