"""Fresh interpreters: what a user's machine would see, with nothing of aoconvert in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aoconvert.errors import VerificationError

_CHILDREN = Path(__file__).parent / "children"


def ask(child: str, request: dict[str, Any], *, environment: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Run a program of ``children`` with a request on stdin, and read its answer, one JSON value a line.

    The interpreter is isolated (``-I``: no ``PYTHON*`` variables, no current folder), and offline unless it is given
    another ``environment``.

    Raises:
        VerificationError: it died without an answer.
    """
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    if environment is None:
        offline = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment = {**offline, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", str(_CHILDREN / f"{child}.py")],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            cwd=empty,
            env={**environment, **quiet},
            check=False,
        )
    answers = []
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            answers.append(json.loads(line))
    if done.returncode != 0 or not answers:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise VerificationError(f"the fresh interpreter died ({how}): {last}")
    return answers
