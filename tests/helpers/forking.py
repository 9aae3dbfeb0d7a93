"""Processes that are forked where their imports are done already, in place of interpreters that import for seconds.

A server (``forking_server.py``) for each set of imports and of environment variables that imports read, shared by all
processes of a test run. What a child is not: started by ``exec``. Its modules, and what they did when they were
imported, are those of its server, which imports only what the child's program would import itself.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest

_SERVER = Path(__file__).with_name("forking_server.py")
# what is read while the libraries are imported: a server has it as its children shall
_READ_AT_IMPORT = (
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "DIFFUSERS_",
    "TORCH",
    "PYTORCH",
    "PYTHON",
    "OMP_",
    "MKL_",
    "CUDA",
)
_ALSO = ("HOME", "LANG", "LC_ALL", "PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "AOCONVERT_COMPILE")
_ISOLATED = ("-I", "-W", "ignore")
# seconds of processor time that children took, for who counts them
used = 0.0


class Forked:
    """A forked process: what there is of ``subprocess.Popen`` to wait for it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._lock = threading.Lock()
        self.returncode: int | None = None
        self.pid: int = json.loads(self._lines.readline())["pid"]

    def poll(self) -> int | None:
        """The exit code, once it ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """
        global used
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = 0.1 if until is None else max(0.0, until - time.monotonic())
            found = (
                select.select([self._connection], [], [], min(left, 0.1))[0] if self._connection.fileno() >= 0 else []
            )
            with self._lock:
                if self.returncode is None and found:
                    end = json.loads(self._lines.readline())
                    self._lines.close()
                    self._connection.close()
                    self.returncode = int(end["code"])
                    used += end["seconds"]
            if self.returncode is None and until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired("forked", timeout or 0)
        return self.returncode


class Forker:
    """The servers of a test run.

    Args:
        folder: of all processes of the run; their sockets are there.
        owner: the process with which the servers end.
    """

    def __init__(self, folder: Path, owner: int) -> None:
        self._folder = folder
        self._owner = owner

    @classmethod
    def of_run(cls, factory: pytest.TempPathFactory) -> Forker:
        """For the tests of this run, in whichever process."""
        root = factory.getbasetemp()
        side_by_side = "PYTEST_XDIST_WORKER" in os.environ
        folder = (root.parent if side_by_side else root) / "fork"
        folder.mkdir(exist_ok=True)
        return cls(folder, os.getppid() if side_by_side else os.getpid())

    def start(
        self,
        words: list[str],
        imports: str,
        *,
        flags: tuple[str, ...] = (),
        stdin: IO[Any],
        stdout: IO[Any],
        stderr: IO[Any],
        cwd: str,
        env: Mapping[str, str],
        session: bool = False,
    ) -> Forked:
        """Fork a process where ``imports`` was executed, and run ``words`` in it.

        Args:
            words: ``FILE …``, ``-m MODULE …`` or ``-c CODE …``.
            imports: what its server executed first.
            flags: of its server's interpreter.
            stdin: its input; ``stdout`` and ``stderr``: its outputs.
            cwd: its folder.
            env: its environment.
            session: give it a session of its own; else it has a process group of its own.
        """
        connection = self._connect(imports, flags, env)
        request = {"argv": words, "environment": dict(env), "folder": cwd, "session": session}
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [data], [file.fileno() for file in (stdin, stdout, stderr)])
        connection.sendall(data[sent:])
        return Forked(connection)

    def _connect(self, imports: str, flags: tuple[str, ...], env: Mapping[str, str]) -> socket.socket:
        fixed = {name: value for name, value in env.items() if name.startswith(_READ_AT_IMPORT) or name in _ALSO}
        key = hashlib.sha256(json.dumps([imports, flags, sorted(fixed.items())]).encode()).hexdigest()[:12]
        path = self._folder / key
        with (self._folder / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._serve(path, imports, flags, env)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        return connection

    def _serve(self, path: Path, imports: str, flags: tuple[str, ...], env: Mapping[str, str]) -> None:
        words = [sys.executable, *flags, str(_SERVER), str(path), str(self._owner)]
        with path.with_suffix(".log").open("w") as log:
            server = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=dict(env), cwd="/", start_new_session=True
            )
        assert server.stdin is not None
        server.stdin.write(imports.encode())
        server.stdin.close()
        while not path.exists():
            assert server.poll() is None, path.with_suffix(".log").read_text()
            time.sleep(0.02)
        server.returncode = 0  # it is not waited for


def imports_of(program: str, request: dict[str, Any]) -> str:
    """What a program of ``verification/children`` imports itself, as the first that it does with this request."""
    named = [f"import {name}" for name in request.get("imports", ())]
    if program == "load_child":
        return "\n".join(["import torch", *named])
    if program == "library_child":
        libraries = {"diffusers", "transformers"} if request["kind"] == "pipeline" else {request["kind"]}
    else:
        found = [node for node in ast.parse(request["code"]).body if isinstance(node, ast.Import | ast.ImportFrom)]
        named = [ast.unparse(node) for node in found if isinstance(node, ast.Import)]
        libraries = {(node.module or "").partition(".")[0] for node in found if isinstance(node, ast.ImportFrom)}
    models = {
        "transformers": "import transformers.modeling_utils",
        "diffusers": "from diffusers import DiffusionPipeline",
    }
    return "\n".join(["import torch", *named, *(models[name] for name in sorted(libraries & models.keys()))])


def start_forked(forker: Forker, program: Path, stdin: IO[bytes], process_group: int, **options: Any) -> Forked:
    """Start a program of ``verification/children`` with a request on stdin, as ``process.start_interpreter`` does."""
    request = json.load(stdin)
    stdin.seek(0)
    assert process_group == 0  # one of its own
    imports = imports_of(program.stem, request)
    return forker.start([str(program)], imports, flags=_ISOLATED, stdin=stdin, **options)
