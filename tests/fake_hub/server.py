"""A Hugging Face Hub on loopback: real HTTP, real files on disk, driven by the unmodified huggingface_hub client.

``LoopbackHub`` is the tests' side of a process (``hub.process``) that serves the Hub, and beside it, on another port
and thus another origin, the store that LFS files are redirected to and uploaded to, as the real Hub does; with
``state.xet`` also a Xet CAS. Repos, commits, branches, tags, pull requests, accounts and collections are files, which
``hub.state.HubState`` reads and writes here as there, so a test may prepare and look at them at any time, and may kill
any client. Every request is logged with the body bytes that came and went. Faults can be put on any path of any of the
servers: a status, a reset, a body cut short, an answer that is lost after the work is done, a delay.

The modules: ``wire`` (one exchange), ``traffic`` (log and faults), ``disk``, ``accounts``, ``state`` (what is kept),
``access`` (who may), ``browse``, ``uploads``, ``store``, ``repos``, ``community``, ``curation``, ``jobs`` (the
endpoints), ``card``, ``attributes`` (the Hub's rules for cards and for large files).

What it does not prove: that the real Hub answers like this in every case. Answers follow its documented API, public
reports of what it says, and what the client reads of them; statuses of errors that the client does not tell apart, and
the wording of most messages, are assumptions. So are: which token may do what, beyond the cases in ``uploads``; that
the files of a gated repo can be listed without access; that a zero byte makes a file binary for preupload; most of
what ``card`` refuses. Tree ids of folders are not git's, and commits have one parent. Not there at all: TLS, redirects
of renamed repos, rate limits by themselves, quotas, cross-repo copies, git itself, speed. The client treats a bare 401
as a missing repo only under ``https://``, so this server names the error in ``X-Error-Code`` where the real one may
not.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fake_hub.state import HubState
from fake_hub.traffic import Fault, Request, total_bytes

__all__ = ["Fault", "LoopbackHub", "Request", "total_bytes"]


class LoopbackHub:
    """A Hub on a folder of its own, with its state, log and faults. Use as a context manager.

    Processes are used again: a hub that is left gives its process to the next one, which begins on other ports, without
    a log and without faults.
    """

    def __init__(self, root: Path, *, xet: bool = False) -> None:
        self.state = HubState(root.resolve())
        if xet:
            self.state.xet = True
        self.faults = Faults(self)

    def __enter__(self) -> LoopbackHub:
        self._process = _take()
        addresses = self._process.call("POST", "/serve", {"root": str(self.state.root)})
        self.endpoint: str = addresses["hub"]
        self.store: str = addresses["store"]
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        errors = self._process.call("POST", "/stop")
        _give_back(self._process)
        if errors and kind is None:
            raise AssertionError("the loopback Hub failed:\n" + "\n".join(errors))

    @property
    def cas(self) -> str:
        """The address of the Xet CAS, which is started if it was not."""
        address: str = self._process.call("GET", "/cas")
        return address

    @property
    def log(self) -> list[Request]:
        """Every request since the start, in the order of the answers."""
        return [Request(**raw) for raw in self._process.call("GET", "/log")]

    def requests(self, pattern: str, *, method: str | None = None, server: str | None = None) -> list[Request]:
        """Logged requests whose path matches."""
        return [
            entry
            for entry in self.log
            if re.search(pattern, entry.path) and method in (None, entry.method) and server in (None, entry.server)
        ]


class Faults:
    """What goes wrong, by way of the server process: a fault counts from when it is added, and is copied then."""

    def __init__(self, hub: LoopbackHub) -> None:
        self._hub = hub

    def append(self, fault: Fault) -> None:
        self += [fault]

    def __iadd__(self, faults: Iterable[Fault]) -> Faults:
        self._hub._process.call("POST", "/faults", {"faults": [fault.to_json() for fault in faults]})
        return self

    def clear(self) -> None:
        self._hub._process.call("DELETE", "/faults")


class _Process:
    """A server process. Its standard input is ours: it ends with us."""

    def __init__(self) -> None:
        tests = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fake_hub.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=tests,
            env={**os.environ, "PYTHONPATH": str(tests)},
            start_new_session=True,  # Ctrl-C ends the tests first
        )
        assert self._process.stdout is not None
        self._control = urlsplit(json.loads(self._process.stdout.readline())).netloc

    def call(self, method: str, path: str, body: object = None) -> Any:
        connection = HTTPConnection(self._control, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = json.loads(answer.read())
            if answer.status != 200:
                raise AssertionError(f"the loopback Hub failed at {path}: {content}")
            return content
        finally:
            connection.close()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


_idle: list[_Process] = []
_lock = threading.Lock()


def _take() -> _Process:
    with _lock:
        return _idle.pop() if _idle else _Process()


def _give_back(process: _Process) -> None:
    with _lock:
        _idle.append(process)


@atexit.register
def _stop_all() -> None:
    while _idle:
        _idle.pop().stop()
