"""``aoconvert`` on the ``PATH`` of a script, forked where its imports are done: see ``forking``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from helpers.forking import Forker

_SHIM = """#!{python}
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.forking import Forker, WITHOUT_HUB

forker = {forker}
imports = WITHOUT_HUB + forker.fork_children_of_verify()
env = {{**os.environ, "PATH": {path!r}}}  # a server for each PATH is too much
child = forker.popen(["-m", "aoconvert", *sys.argv[1:]], imports, env=env)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(child.pid, number))
code = child.wait()
sys.exit(code if code >= 0 else 128 - code)
"""


def write_command(folder: Path, forker: Forker) -> dict[str, str]:
    """Write ``aoconvert`` into a folder; gives the ``PATH`` that finds it first.

    Args:
        folder: is made.
        forker: of the test run.
    """
    folder.mkdir()
    command = folder / "aoconvert"
    tests = str(Path(__file__).parents[1])
    path = os.environ["PATH"]
    command.write_text(_SHIM.format(python=sys.executable, tests=tests, forker=forker.code, path=path))
    command.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{path}"}
