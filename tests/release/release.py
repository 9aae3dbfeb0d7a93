#!/usr/bin/env python3
"""Make a release, try again where that can help, and write a summary.

::

    release.py RELEASE.toml OWNER [--tries 3] [--wait 60] [--summary release.md] [-- OPTION of aoconvert release ...]

``HF_TOKEN`` says who publishes. It exits as aoconvert does. What it reads is documented: exit codes, names of events,
keys of the documents. It needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HUB = 5  # the exit code of what the Hub refused, or of a Hub that was not there

Document = dict[str, Any]


def run(command: list[str]) -> tuple[int, Document]:
    """Run ``aoconvert release --json``, and give its exit code and last document."""
    last: Document = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        # Ctrl-C in a terminal reaches aoconvert, too: it says what it keeps, and this script stays to read that
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            show(last)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return process.returncode, last


def show(event: Document) -> None:
    """Follow the release as it goes on."""
    match event.get("event"):
        case "progress":
            who = event.get("variant") or ", ".join(event["variants"])
            print(f"{who}: {event['stage']} {event['done_bytes'] / max(event['total_bytes'], 1):.0%}", flush=True)
        case "quantized" | "verified" | "evaluated" as step:
            print(f"{event['variant']}: {step}{'' if event['again'] else ' (by an earlier run)'}", flush=True)
        case "pushed" | "unchanged" as step:
            print(f"{event['variant']}: {step} {event['url']} {event['bytes_sent']} bytes", flush=True)
        case "failed":
            print(f"{event['variant']}: failed: {event['error']['message']}", flush=True)


def can_help(last: Document) -> bool:
    """Whether the same command may succeed if it is run again."""
    if "error" in last:
        return bool(last["error"]["retryable"])
    failed = [variant["error"] for variant in last.get("variants", ()) if variant["status"] == "failed"]
    return bool(failed) and all(error["retryable"] for error in failed)


def missed(variant: Document) -> str:
    """The gates that a variant misses, and by how much."""
    gates = [gate for gate in variant["gates"] if not gate["passed"]]
    return "; ".join(f"{gate['name']} {gate.get('value')} instead of {gate['limit']}" for gate in gates)


def summarize(code: int, last: Document) -> str:
    """The summary, as Markdown."""
    if "error" in last:
        return "".join(f"- {problem}\n" for problem in last["error"]["problems"])
    lines = [f"# {last['name']}: {'ok' if code == 0 else f'exit code {code}'}", ""]
    for variant in last["variants"]:
        said = variant.get("url") or variant["status"]
        if variant["status"] == "gate_failed":
            said = f"not published: {missed(variant)}"
        elif variant["status"] == "failed":
            said = f"failed: {variant['error']['message']}"
        lines.append(f"- {variant['name']}: {said}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Make the release."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("owner")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--wait", type=float, default=60, help="seconds before the second try; twice that each time")
    parser.add_argument("--summary", type=Path, default=Path("release.md"))
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    wanted = parser.parse_args(sys.argv[1:split])
    command = ["aoconvert", "release", wanted.file, "--owner", wanted.owner, "--json", *sys.argv[split + 1 :]]
    for number in range(wanted.tries):
        code, last = run(command)
        if code != HUB or not can_help(last) or number == wanted.tries - 1:
            break
        print(f"the Hub: again in {wanted.wait * 2**number:g} s", flush=True)
        time.sleep(wanted.wait * 2**number)
    wanted.summary.write_text(summarize(code, last), encoding="utf-8")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # between two tries
        sys.exit(130)
