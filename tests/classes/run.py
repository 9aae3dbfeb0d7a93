"""Make the table of classes: ``python tests/classes/run.py --write`` writes ``README.md`` and ``results.jsonl``.

What a stopped run has finished is kept in ``results.jsonl.part`` and not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("AOCONVERT_COMPILE", "0")
sys.path.insert(0, str(Path(__file__).parents[1]))

HERE = Path(__file__).parent
CONFIGS, RESULTS, README = HERE / "configs.json", HERE / "results.jsonl", HERE / "README.md"
PART = HERE / "results.jsonl.part"
_TOGETHER = 12  # classes in one process
_SECONDS = 120  # of the processor, for one class: a busy machine makes no row worse
_WAITED = 3600  # by the clock, for one that waits for what never comes
_LIMITS = {
    signal.SIGPROF: f"took more than {_SECONDS} s of the processor",
    signal.SIGALRM: f"was not done after {_WAITED} s",
}

Record = dict[str, Any]


def configs() -> dict[str, dict[str, Any]]:
    """``LIBRARY:CLASS`` → the changes that make its default config small."""
    return json.loads(CONFIGS.read_text(encoding="utf-8"))


def stored(path: Path = RESULTS) -> dict[str, Record]:
    """The rows that were written last, by title."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {f"{row['library']}:{row['class_name']}": row for row in rows}


def work(titles: list[str]) -> int:
    """In a process of its own: a line for each class when it begins and when it is done."""
    import torch
    from classes.rows import make_row
    from table.run import quiet

    quiet()
    torch.set_num_threads(1)
    found = configs()
    for title in titles:
        print(json.dumps({"began": title}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # both signals end the process
        signal.alarm(_WAITED)
        with tempfile.TemporaryDirectory() as folder:
            row = make_row(title, found[title], Path(folder))
        print(json.dumps({"row": row.to_dict()}), flush=True)
    return 0


def rows(titles: list[str]) -> Iterator[Record]:
    """The row of each class; one that ends its process or takes too long is said to have done so."""
    left = list(titles)
    while left:
        group, began = left[:_TOGETHER], left[0]
        command = [sys.executable, "-W", "ignore", __file__, "--worker", *group]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line) if line.startswith("{") else {}
            if "began" in message:
                began = message["began"]
            elif "row" in message:
                left.remove(began)
                yield message["row"]
        if (code := process.wait()) != 0 and began in left:
            left.remove(began)
            library, _, name = began.partition(":")
            yield _empty(library, name, _LIMITS.get(-code, f"ended its process ({code})"))


def side_by_side(titles: list[str], jobs: int) -> Iterator[Record]:
    """The rows of as many processes as ``jobs`` says, as they come."""
    found: Queue[Record | None] = Queue()

    def run(part: list[str]) -> None:
        for row in rows(part):
            found.put(row)
        found.put(None)

    for place in range(jobs):
        threading.Thread(target=run, args=(titles[place::jobs],), daemon=True).start()
    for _ in range(jobs):
        yield from iter(found.get, None)


def _empty(library: str, name: str, note: str) -> Record:
    keys = {"quantized": None, "tensors": "-", "forward": "-", "verify": "-", "note": note, "seconds": 0.0}
    return {"library": library, "class_name": name, **keys}


def page(found: list[Record], versions: str) -> str:
    """The table in Markdown, its totals first."""
    made = [row for row in found if row["quantized"] is not None]
    ran = [row for row in made if row["forward"] not in ("-",)]
    lines = [
        "# Every class, tiny, in int8",
        "",
        "Each class as its config's defaults give it, but small (`configs.json`), with random weights: saved by its"
        " library, `aoconvert.quantize`d to `int8wo`, opened by `from_pretrained`. *tensors*: every parameter and"
        " buffer has the bits that torchao's `quantize_` gives on the model as its library opens it (`equal*`: but for"
        " buffers that no file holds). *forward*: so has the output. *verify*: its forward check. Made by"
        f" `python tests/classes/run.py --write` with {versions}.",
        "",
        f"- {len(found)} classes of {len({row['library'] for row in found})} libraries, {len(made)} with a result",
        f"- tensors equal: {_count(made, 'tensors', 'equal')} of {len(made)}"
        f" ({_count(made, 'tensors', 'equal*')} more but for buffers that no file holds)",
        f"- an input was found for {len(ran)} of {len(made)}; forward equal: {_count(made, 'forward', 'equal')}",
        f"- verify ok: {_count(made, 'verify', 'ok')}, skipped: {_count(made, 'verify', 'skipped')},"
        f" failed: {_count(made, 'verify', 'FAIL')}",
        f"- refused, or not to be saved or opened by its library: {len(found) - len(made)}",
        "",
        "| class | library | quantized | tensors | forward | verify | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        share = "-" if row["quantized"] is None else f"{row['quantized']}%"
        cells = (row["class_name"], row["library"], share, row["tensors"], row["forward"], row["verify"], row["note"])
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _count(found: list[Record], key: str, value: str) -> int:
    return sum(row[key] == value for row in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write README.md and results.jsonl")
    parser.add_argument("--only", metavar="PATTERN", help="only classes that this regular expression is found in")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run at once")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)
    titles = [title for title in configs() if re.search(arguments.only or "", title)]
    done = stored(PART) if arguments.only is None else {}
    with (PART if arguments.only is None else Path(os.devnull)).open("a", encoding="utf-8") as part:
        for row in side_by_side([title for title in titles if title not in done], arguments.jobs):
            part.write(json.dumps(row) + "\n")
            part.flush()
            done[f"{row['library']}:{row['class_name']}"] = row
            print(json.dumps(row), flush=True)
    found = [done[title] for title in titles]
    bad = [row for row in found if row["verify"] == "FAIL" or row["forward"] in ("FAILS", "differs")]
    print(f"{len(found)} classes, {len(bad)} bad: {', '.join(row['class_name'] for row in bad)}", file=sys.stderr)
    if arguments.write:
        known = stored() if arguments.only is not None else {}
        known |= done
        ordered = [known[title] for title in configs() if title in known]
        lasting = [{key: value for key, value in row.items() if key != "seconds"} for row in ordered]
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in lasting), encoding="utf-8")
        README.write_text(page(ordered, _versions()), encoding="utf-8")
        if arguments.only is None:
            PART.unlink()
    return 1 if bad else 0


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(
        f"{name} {version(name).partition('+')[0]}" for name in ("torch", "torchao", "diffusers", "transformers")
    )


if __name__ == "__main__":
    sys.exit(main())
