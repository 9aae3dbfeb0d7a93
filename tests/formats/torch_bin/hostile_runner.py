"""Run in a fresh interpreter: reads hostile files with an audit hook and a memory limit, and reports as JSON.

Arguments: ``ours`` or ``real`` (a real unpickler, the control), the canary's path, then a folder of files.
"""

import json
import os
import pickle
import resource
import sys
import time
import zipfile
from pathlib import Path

QUIET = {"builtins.id", "object.__getattr__", "object.__setattr__", "sys._getframe"}


class Real(pickle.Unpickler):
    def persistent_load(self, pid):
        return None


def real(path):
    with zipfile.ZipFile(path) as file, file.open("archive/data.pkl") as stream:
        Real(stream).load()


def outcome(read, path, canary, wait):
    """(what happened, its message, seconds, the audit events, whether the canary was there)."""
    start = time.monotonic()
    state["events"], state["path"] = [], path
    try:
        read(Path(path))
        kind, message = "read", ""
    except BaseException as error:
        bases = [base.__name__ for base in type(error).__mro__]
        kind, message = "refused" if "UnsafeFileError" in bases else type(error).__name__, str(error)
    events, state["events"] = state["events"], None
    seconds = time.monotonic() - start
    while wait and not os.path.exists(canary) and time.monotonic() < start + 3:  # noqa: PTH110
        time.sleep(0.01)
    found = os.path.exists(canary)  # noqa: PTH110
    if found:
        os.unlink(canary)  # noqa: PTH108
    return kind, message[:2000], seconds, events[:20], found


def hook(event, args):
    events = state["events"]
    if events is not None and event not in QUIET and not (event == "open" and str(args[0]) == state["path"]):
        events.append(f"{event} {args!r}"[:200])


state = {"events": None, "path": ""}

if __name__ == "__main__":
    mode, canary, folder = sys.argv[1:]
    paths = sorted(Path(folder).iterdir())
    if mode == "ours":
        from aoconvert.formats.torch_bin.header import read_bin as reader

        reader(paths[0])  # the first one is clean: everything is imported once
        if "torch" in sys.modules or "torchao" in sys.modules:
            raise SystemExit("torch was imported")
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    else:
        reader = real
    sys.addaudithook(hook)
    results = {path.name: outcome(reader, str(path), canary, mode == "real") for path in paths}
    # not ru_maxrss, which starts at the size of whoever started this process
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    print("\n" + json.dumps({"peak": peak, "results": results}))
