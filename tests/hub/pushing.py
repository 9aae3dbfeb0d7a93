"""What the tests of ``push`` share: checkpoints to push, and a client process that pushes one after the other."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_hub.fixtures import HubClient
from fake_hub.server import LoopbackHub
from fake_hub.state import Entry
from helpers.forking import WITHOUT_HUB, Forker

TOKEN = "hf_theTokenOfTheTests0123456789abcdefgh"
WITH_TOKEN = {"HF_TOKEN": TOKEN}
XET = {**WITH_TOKEN, "HF_HUB_DISABLE_XET": "0"}

# Pushes what stdin asks for, one JSON value a line, and answers each with one line.
_DRIVER = """
import json, sys, traceback
from pathlib import Path
from aoconvert.errors import AoconvertError
from aoconvert.hub.push import push
from aoconvert.hub.types import PushOptions
from aoconvert.progress import Silent

for line in sys.stdin:
    request = json.loads(line)
    try:
        done = push(Path(request["folder"]), request["repo"], PushOptions(**request["options"]), Silent())
        answer = {"value": done.to_dict()}
    except AoconvertError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint,
                  "exit_code": error.exit_code, "traceback": traceback.format_exc()}
    except Exception:
        answer = {"crash": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
"""


class Pusher:
    """One client process: many pushes, one import."""

    def __init__(self, client: HubClient, env: dict[str, str] | None = None) -> None:
        self.hub = client.hub
        assert client.forker is not None
        self._process = client.forker.popen(
            ["-c", _DRIVER],
            WITHOUT_HUB + client.forker.fork_children_of_verify(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=client.environment({**WITH_TOKEN, **(env or {})}),
        )

    def push(self, folder: Path, repo: str, **options: Any) -> dict[str, Any]:
        """What ``push`` returned, or the error that it raised, as ``attempt`` of the fixtures has it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"folder": str(folder), "repo": repo, "options": options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._process.communicate()[1]
        answer: dict[str, Any] = json.loads(line)
        assert "crash" not in answer, answer["crash"]
        return answer

    def close(self) -> str:
        """End it; what it wrote to stderr."""
        return self._process.communicate()[1]


@contextmanager
def pusher(root: Path, forker: Forker, *, xet: bool = False) -> Iterator[Pusher]:
    """A Hub with a user called ``me``, and a client process that is logged in there."""
    (root / "hub").mkdir(parents=True)
    with LoopbackHub(root / "hub", xet=xet) as hub:
        hub.state.add_user("me", TOKEN)
        found = Pusher(HubClient(hub, root / "hf_home", forker), XET if xet else None)
        try:
            yield found
        finally:
            said = found.close()
            assert "Traceback" not in said, said


def entries(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, Entry]:
    """What a branch holds."""
    sha = hub.state.resolve(repo, revision)
    return {} if sha is None else dict(hub.state.entries(repo, sha))


def problem(outcome: dict[str, Any], exit_code: int) -> dict[str, Any]:
    """An error as it must be: its exit code, one line, something to do next, and no token anywhere."""
    assert "error" in outcome, outcome
    assert outcome["exit_code"] == exit_code, outcome
    assert "\n" not in outcome["message"]
    assert len(outcome["message"]) < 1000
    assert TOKEN not in json.dumps(outcome)
    return outcome
