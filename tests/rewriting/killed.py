"""Rewritings that kill themselves, and run again, from one process that has everything imported already.

    python killed.py '[{"verb": "migrate", "source": …, "folder": …, "options": {…}, "after": [3, 20]}, …]'

Each run is a fork of this process, killed by SIGKILL when so many tensors have passed. Prints a JSON report for each:
what was under the output's name when it was killed, how many tensors the last run made, and whether its bytes are those
of a run that nothing stopped. This process uses no thread of torch, so that its forks may.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import aoconvert
from aoconvert.environment import import_diffusers, import_torchao
from aoconvert.progress import Silent


class Count(Silent):
    """Counts the tensors that are made, and kills the process after some."""

    def __init__(self, after):
        self.after, self.made, self.stage = after, 0, ""

    def start(self, stage, total_bytes):
        self.stage = stage

    def advance(self, nbytes, current=""):
        if self.stage in ("migrate", "convert"):
            self.made += 1
            if self.made == self.after:
                os.kill(os.getpid(), signal.SIGKILL)


def contents(folder):
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    values = json.loads(found["aoconvert.json"])
    values.pop("run")
    return {**found, "aoconvert.json": values}


def run(task, output, after=None):
    """How a run ended, and how many tensors it made."""
    report = Path(task["folder"]) / "report"
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1], int(report.read_text() or 0) if report.exists() else 0
    try:
        progress = Count(after)
        getattr(aoconvert, task["verb"])(task["source"], output=output, progress=progress, **task["options"])
        report.write_text(str(progress.made))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def import_all():
    """What the forks will need."""
    import_torchao()
    import_diffusers()
    import diffusers
    import transformers

    print(diffusers.AutoencoderKL, transformers.LlamaForCausalLM, file=sys.stderr)


def play(task):
    folder = Path(task["folder"])
    status, whole = run(task, folder / "whole")
    assert status == 0, "the first run"
    appeared = []
    output = folder / "runs" / "out"
    for after in task["after"]:
        status, _ = run(task, output, after)
        assert os.WIFSIGNALED(status), status
        appeared.append(output.exists())
    status, made = run(task, output)
    assert status == 0, "the last run"
    left = [path.name for path in output.parent.iterdir()]
    same = contents(output) == contents(folder / "whole")
    return {"appeared": any(appeared), "whole": whole, "made": made, "left": left, "same": same}


if __name__ == "__main__":
    import_all()
    print(json.dumps([play(task) for task in json.loads(sys.argv[1])]))
