"""Runs that are stopped and started again, from one process that has everything imported already.

    python kill_runner.py '{"source": …, "folder": …, "scheme": …, "options": {…}, "seed": 0, "kills": 10}'

Each run is a fork of this process. With "kills" it is killed with SIGKILL after a random time, or when its journal has
reached a random length, or when the result is about to appear. With "full" the disk, a small tmpfs, has room for a
random number of bytes only. With both, one comes after the other. Prints a JSON report. This process uses no thread of
torch, so that its forks may.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import aoconvert
from aoconvert.checkpoint import manifest
from aoconvert.engine.convert import run
from aoconvert.formats.hashing import hash_on
from aoconvert.options import make_options
from aoconvert.planning.build import build_plan
from aoconvert.progress import Silent
from aoconvert.sources import resolve


def contents(folder):
    """Every file's content, the manifest without its ``run``."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    values = json.loads(found[manifest.MANIFEST_NAME])
    values.pop("run")
    found[manifest.MANIFEST_NAME] = json.dumps(values).encode()
    return found


def verified(folder):
    """Whether the manifest is sound and every file that it names is what it says."""
    for entry in manifest.load(folder).files():
        digest = hashlib.sha256()
        with (folder / entry.path).open("rb") as file:
            size = hash_on(file.fileno(), digest, 0, entry.size + 1)
        if (size, digest.hexdigest()) != (entry.size, entry.sha256):
            return False
    return True


def start(task, output, report, room=None):
    """A fork that quantizes; writes what happened to ``report``. The disk is filled up to ``room`` after the plan."""
    process = os.fork()
    if process:
        return process
    try:
        options = make_options(task["scheme"], {"output": output, "device": "cpu", **task["options"]})
        plan = build_plan(resolve(str(task["source"])), options, need_weights=True)
        if room is not None:
            free = shutil.disk_usage(output.parent).free
            with (output.parent / "ballast").open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - room))
        result = run(plan, Silent(), command="")
        report.write_text(json.dumps({"resumed": result.resumed, "warnings": result.warnings}))
        os._exit(0)
    except BaseException as error:
        report.write_text(json.dumps({"error": f"{type(error).__name__}: {error}", "hint": getattr(error, "hint", "")}))
        traceback.print_exc()
        os._exit(1)


def length(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def wait_for_trigger(process, partial, chance, seconds):
    """Until the moment to kill; whether the run still lives then."""
    kind = chance.choice(["time", "journal", "journal", "journal", "end"])
    journal = partial / "aoconvert.journal"
    target = length(journal) + chance.randrange(1, 60_000)
    until = time.monotonic() + (chance.uniform(0, seconds) if kind == "time" else 60)
    while time.monotonic() < until:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        if kind == "journal" and length(journal) >= target:
            break
        if kind == "end" and (partial / "aoconvert.json.partial").exists():
            time.sleep(chance.choice([0, 0, 1e-4, 1e-3]))
            break
        time.sleep(0 if kind == "end" else 2e-4)
    return True


def campaign(task):
    folder, chance = Path(task["folder"]), random.Random(task["seed"])
    report, output = folder / "report.json", folder / "runs" / "out"
    partial = output.parent / ".out.aoconvert-partial"
    output.parent.mkdir()
    began = time.monotonic()
    process = start(task, folder / "whole", report)
    assert os.waitpid(process, 0)[1] == 0, report.read_text()
    seconds = time.monotonic() - began
    expected = contents(folder / "whole")
    kills, runs, resumed, halfway = 0, 0, [], []
    while True:
        process = start(task, output, report)
        runs += 1
        if kills < task["kills"] and wait_for_trigger(process, partial, chance, seconds):
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            halfway.append((partial / "aoconvert.journal").exists())
        if output.exists() and not verified(output):
            return {"problem": f"an output that does not verify after {kills} kills"}
        if os.WIFEXITED(status):
            if status:
                return {"problem": report.read_text(), "kills": kills}
            said = json.loads(report.read_text())
            resumed.append(said["resumed"])
            if unused := [line for line in said["warnings"] if "earlier run" in line]:
                return {"problem": unused}
        if output.exists():
            if contents(output) != expected:
                return {"problem": f"other bytes after {kills} kills"}
            if os.WIFEXITED(status) and [path.name for path in output.parent.iterdir()] != ["out"]:
                return {"problem": f"left: {[path.name for path in output.parent.iterdir()]}"}
            if kills >= task["kills"]:
                return {"kills": kills, "runs": runs, "resumed": resumed, "journals": sum(halfway), "seconds": seconds}
            aside = folder / f"done{runs}"
            output.rename(aside)


def full_disks(task):
    folder, chance = Path(task["folder"]), random.Random(task["seed"])
    report, disk = folder / "report.json", folder / "disk"
    if not (folder / "whole").exists():
        assert os.waitpid(start(task, folder / "whole", report), 0)[1] == 0, report.read_text()
    expected = contents(folder / "whole")
    size = sum(map(len, expected.values()))
    said = []
    for _ in range(task["full"]):
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size + (64 << 20)}", "tmpfs", disk], check=True)
        try:
            room = chance.randrange(0, size * 11 // 10)
            status = os.waitpid(start(task, disk / "out", report, room), 0)[1]
            first = json.loads(report.read_text())
            if status and (not first["error"].startswith("WriteError: ") or "free space" not in first["hint"]):
                return {"problem": first, "room": room}
            if (disk / "out").exists() != (status == 0):
                return {"problem": "an output that is not whole", "room": room}
            (disk / "ballast").unlink()
            if status and os.waitpid(start(task, disk / "out", report), 0)[1]:
                return {"problem": report.read_text(), "room": room}
            if contents(disk / "out") != expected or [path.name for path in disk.iterdir()] != ["out"]:
                return {"problem": "other bytes, or something left", "room": room}
            again = json.loads(report.read_text())
            if status and any("earlier run" in line for line in again["warnings"]):
                return {"problem": again["warnings"], "room": room}
            said.append([room, first.get("hint"), again["resumed"]])
        finally:
            subprocess.run(["umount", disk], check=True)
            disk.rmdir()
    return {"size": size, "said": said}


def main():
    task = json.loads(sys.argv[1])
    # imports what the forks will need
    aoconvert.plan(task["source"], task["scheme"], output=Path(task["folder"]) / "x", device="cpu", **task["options"])
    report = campaign(task) if "kills" in task else {}
    if "full" in task and "problem" not in report:
        report |= full_disks(task)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
