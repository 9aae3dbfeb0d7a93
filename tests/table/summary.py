"""The table's summary for the README: ``python tests/table/summary.py`` prints it, ``--write`` puts it there."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).with_name("results.json")

_DIFFUSERS = ("cogvideox", "flux", "pixart", "sd3", "wan")
_TITLES = {"cogvideox": "CogVideoX", "flux": "Flux", "pixart": "PixArt", "sd3": "SD3", "wan": "Wan"}
_TITLES |= {"llama-tied": "Llama", "mixtral": "Mixtral", "t5": "T5", "opt": "OPT", "bert": "BERT"}
# rows that differ in the number of bits only
_FOLDED = {r"int8dq_int\d": "int8dq_intX", r"intx\dwo": "intXwo", r"uint\dwo": "uintXwo"}
# by the first word of what a cell says
_EQUAL = {"quantize_": "`quantize_`", "quantize_,": "`quantize_`, asks", "torchao's": "class"}
_HEAD = ("scheme", "diffusers", "transformers", "bit-equal to", "opens with", "on a CPU", "left unquantized")

Cells = dict[str, dict[str, dict[str, Any]]]


def block(cells: Cells) -> str:
    """What stands between the markers: one line a scheme, those that differ in bits only together."""
    groups: dict[str, list[str]] = {}
    for row in cells:
        groups.setdefault(_title(row), []).append(row)
    lines = [_HEAD, *[_line(title, {row: cells[row] for row in rows}) for title, rows in groups.items()]]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "---|" * len(_HEAD))
    diffusers = ", ".join(_TITLES[name] for name in _DIFFUSERS)
    transformers = ", ".join(title for name, title in _TITLES.items() if name not in _DIFFUSERS)
    notes = (
        f"diffusers: {diffusers}; transformers: {transformers}; small models of the real classes, `int4wo` in groups "
        "of 32. *bit-equal to*: every tensor equals what torchao's `quantize_` produces from the model; *asks*: "
        "`quantize_` insists on a GPU, and the test made that check pass; *class*: every tensor equals what torchao's "
        "class for that device produces, with its packing op done in Python. *after an import*: the import that the "
        "model card shows. *on a CPU*: one step or sequence of the opened model."
    )
    return "\n".join([*text, "", notes])


def _title(row: str) -> str:
    name = next((title for pattern, title in _FOLDED.items() if re.fullmatch(pattern, row)), row)
    scheme, _, device = name.partition("/")
    return f"`{scheme} --layout-device {device}`" if device else f"`{scheme}`"


def _line(title: str, rows: Cells) -> tuple[str, ...]:
    made = [cell for columns in rows.values() for cell in columns.values() if "empty" not in cell]
    equal = sorted({_EQUAL[cell["equal"].split()[0]] for cell in made})
    opens = {cell["opens"] + (" after an import" if cell.get("imports") else "") for cell in made}
    return (
        title,
        _count(rows, [name for name in _TITLES if name in _DIFFUSERS]),
        _count(rows, [name for name in _TITLES if name not in _DIFFUSERS]),
        ", ".join(equal),
        ", ".join(sorted(opens, reverse=True)),
        _forward(rows),
        "; ".join(_left_out(rows)) or "nothing",
    )


def _count(rows: Cells, families: list[str]) -> str:
    whole = sum(all("empty" not in columns[name] for columns in rows.values()) for name in families)
    return f"{whole} of {len(families)}"


def _forward(rows: Cells) -> str:
    """What most families give, and those that give something else."""
    said: dict[str, list[str]] = {}
    for columns in rows.values():
        for name, cell in columns.items():
            if "empty" not in cell and name not in said.setdefault(cell["forward"], []):
                said[cell["forward"]].append(name)
    usual = max(said, key=lambda text: len(said[text]))
    rest = [f"{', '.join(map(_TITLES.__getitem__, names))}: {text}" for text, names in said.items() if text != usual]
    return "; ".join([usual, *rest])


def _left_out(rows: Cells) -> list[str]:
    """Why a family has no result, and why a mixture's experts are not quantized."""
    found: dict[str, None] = {}
    for row, columns in rows.items():
        scheme = row.partition("/")[0]
        for name, cell in columns.items():
            if "empty" in cell:
                found[f"{_TITLES[name]}: {cell['empty']}"] = None
            elif cell.get("experts", "quantized") != "quantized":
                found[f"{_TITLES[name]}'s experts: {cell['experts'].replace(scheme, 'it')}"] = None
    return list(found)


def put(text: str, made: str) -> str:
    """The README with this between its markers.

    Raises:
        ValueError: it has not exactly one pair of markers.
    """
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed or BEGIN in after or END in after:
        raise ValueError(f"README.md has not exactly one {BEGIN} with {END} after it")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it between the README's markers")
    made = block(json.loads(RESULTS.read_text(encoding="utf-8"))["cells"])
    if not parser.parse_args().write:
        print(made)
        return 0
    README.write_text(put(README.read_text(encoding="utf-8"), made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
