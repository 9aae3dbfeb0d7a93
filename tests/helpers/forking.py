"""Processes that are forked where their imports are done already, in place of interpreters that import for seconds.

A server (``forking_server.py``) for each set of imports and of environment variables that imports read, shared by all
processes of a test run. What a child is not: started by ``exec``. Its modules, and what they did when they were
imported, are those of its server: nothing here shows what a command imports, how long it takes to start, or what memory
it takes, nor that it works with an import missing. A test of these starts a real interpreter.
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

_TESTS = Path(__file__).parents[1]
_SERVER = Path(__file__).with_name("forking_server.py")
# what is read while libraries are imported: a server has it as its children shall
_READ_AT_IMPORT = ("TORCH", "PYTORCH", "PYTHON", "OMP_", "MKL_", "CUDA", "LD_", "LANG", "LC_", "HOME", "XDG_", "PATH")
_READ_BY_HUGGINGFACE = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_", "ACCELERATE_")
_ISOLATED = ("-I", "-W", "ignore")

_AOCONVERT = """
import importlib, pkgutil, torch, torchao.quantization, aoconvert
for module in pkgutil.walk_packages(aoconvert.__path__, "aoconvert."):
    if ".children." not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
_LIBRARIES = "import transformers.modeling_utils\nfrom diffusers import DiffusionPipeline\n"
# for whatever runs aoconvert with the HF_ variables of this test run
WITH_LIBRARIES = _AOCONVERT + _LIBRARIES
# for a Hub and a cache of one's own: they are read when huggingface_hub is imported, which comes later
WITHOUT_HUB = _AOCONVERT

# seconds of processor time that children took, for who counts them
used = 0.0


class Forked(subprocess.Popen[Any]):
    """A process that a server forks; to be used like any other.

    Args:
        connection: to the server.
        words: ``FILE …``, ``-m MODULE …`` or ``-c CODE …``.
        options: of ``subprocess.Popen``: what concerns input, outputs, text, folder and environment.
    """

    def __init__(self, connection: socket.socket, words: list[str], **options: Any) -> None:
        self._connection = connection
        self._asking = threading.Lock()
        self._request = {
            "argv": words,
            "environment": dict(options["env"]),
            "folder": str(options.get("cwd") or Path.cwd()),
            "session": options.get("start_new_session", False),
        }
        super().__init__(words, **options)

    def _execute_child(self, *arguments: Any) -> None:
        """Ask the server in place of ``exec``; the ends of the pipes are where every Python from 3.11 on has them."""
        pipes = arguments[10:16]  # read and written end of input, output, errors
        files = [own if own != -1 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        try:
            data = json.dumps(self._request).encode() + b"\n"
            sent = socket.send_fds(self._connection, [data], files)
            self._connection.sendall(data[sent:])
            self._lines = self._connection.makefile("rb")
            self.pid = json.loads(self._lines.readline())["pid"]
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._look(0)

    def _wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 0.1 if until is None else until - time.monotonic()
            code = self._look(max(0.0, min(left, 0.1)))
            if code is not None:
                return code
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)

    def _look(self, seconds: float) -> int | None:
        """Wait so long for its end."""
        global used
        with self._asking:
            if self.returncode is None and select.select([self._connection], [], [], seconds)[0]:
                end = json.loads(self._lines.readline())
                self._lines.close()
                self._connection.close()
                self.returncode = int(end["code"])
                used += end["seconds"]
            return self.returncode


class Forker:
    """The servers of a test run.

    Args:
        folder: of all processes of the run; their sockets are there.
        owner: the process with which the servers end.
        variables: of the test run, that Hugging Face's libraries read; by default those of this process.
    """

    def __init__(self, folder: Path, owner: int, variables: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._owner = owner
        if variables is None:
            variables = {name: value for name, value in os.environ.items() if name.startswith(_READ_BY_HUGGINGFACE)}
        self.variables = dict(variables)

    @classmethod
    def of_run(cls, factory: pytest.TempPathFactory) -> Forker:
        """For the tests of this run, in whichever process."""
        root = factory.getbasetemp()
        side_by_side = "PYTEST_XDIST_WORKER" in os.environ
        folder = (root.parent if side_by_side else root) / "fork"
        folder.mkdir(exist_ok=True)
        return cls(folder, os.getppid() if side_by_side else os.getpid())

    @property
    def code(self) -> str:
        """An expression that makes it in another process, where ``Forker`` and ``Path`` are imported."""
        return f"Forker(Path({str(self._folder)!r}), {self._owner}, {self.variables!r})"

    def popen(self, words: list[str], imports: str, *, flags: tuple[str, ...] = (), **options: Any) -> Forked:
        """Fork a process where ``imports`` was executed.

        Args:
            words: what it runs: ``FILE …``, ``-m MODULE …`` or ``-c CODE …``.
            imports: what its server executed first.
            flags: of its server's interpreter.
            options: of ``subprocess.Popen``: what concerns input, outputs, text, folder and environment.
        """
        options = {"env": dict(os.environ), **options}
        return Forked(self._connect(imports, flags, options["env"]), words, **options)

    def run(
        self, words: list[str], imports: str, *, input: Any = None, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Fork a process, and wait for its end, as ``subprocess.run`` does with ``capture_output``."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(words, imports, stdin=subprocess.PIPE, text=True, **pipes, **options) as process:
            try:
                out, err = process.communicate(input or "", timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def _connect(self, imports: str, flags: tuple[str, ...], env: Mapping[str, str]) -> socket.socket:
        prefixes = _READ_AT_IMPORT + (() if _leaves_hub(imports) else _READ_BY_HUGGINGFACE)
        fixed = {name: value for name, value in env.items() if name.startswith(prefixes)}
        if "-I" in flags:
            fixed = {name: value for name, value in fixed.items() if not name.startswith("PYTHON")}
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
        if _leaves_hub(imports):
            imports += "\nimport sys\nassert 'huggingface_hub' not in sys.modules\n"
        server.stdin.write(imports.encode())
        server.stdin.close()
        while not path.exists():
            assert server.poll() is None, path.with_suffix(".log").read_text()
            time.sleep(0.02)
        server.returncode = 0  # nobody waits for it

    def fork_children_of_verify(self) -> str:
        """Code, for the end of ``imports``, after which ``verify`` forks what it starts."""
        return f"""
import sys
from functools import partial
from pathlib import Path
sys.path.append({str(_TESTS)!r})
from helpers.forking import Forker, start_forked
from aoconvert.verification import process
process.start_interpreter = partial(start_forked, {self.code})
"""


def _leaves_hub(imports: str) -> bool:
    """Whether huggingface_hub is not imported; the server refuses to serve where that is wrong."""
    return not any(name in imports for name in ("transformers", "diffusers", "accelerate"))


def imports_of(program: str, request: dict[str, Any]) -> str:
    """What a program of ``verification/children`` imports itself, as the first that it does with this request."""
    named = [f"import {name}" for name in request.get("imports", ())]
    if program == "load_child":
        return "\n".join(["import torch", *named])
    if program == "library_child":
        libraries = {"diffusers", "transformers"} if request["kind"] == "pipeline" else {request["kind"]}
    elif "code" not in request:  # eval's programs open the original themselves
        libraries = {"diffusers", "transformers"} if "how" not in request else {request["how"]["library"]}
    else:
        found = [node for node in ast.parse(request["code"]).body if isinstance(node, ast.Import | ast.ImportFrom)]
        named = [ast.unparse(node) for node in found if isinstance(node, ast.Import)]
        libraries = {(node.module or "").partition(".")[0] for node in found if isinstance(node, ast.ImportFrom)}
    models = {
        "transformers": "import transformers.modeling_utils",
        "diffusers": "from diffusers import DiffusionPipeline",
    }
    return "\n".join(["import torch", *named, *(models[name] for name in sorted(libraries & models.keys()))])


def start_forked(forker: Forker, program: Path, *, stdin: IO[bytes], **options: Any) -> Any:
    """Start a program of ``verification/children`` with a request on stdin, as ``process.start_interpreter`` does.

    What may not use the Hub has no use for the test's own: all such children share servers. With a cache or a Hub of
    its own, a real interpreter: no other child would have a use for its server.
    """
    imports = imports_of(program.stem, json.load(stdin))
    stdin.seek(0)
    env = options["env"]
    if env.get("HF_HUB_OFFLINE") == "1":
        kept = {name: value for name, value in env.items() if not name.startswith(("HF_", "HUGGING"))}
        options["env"] = {**forker.variables, **kept, "HF_HUB_OFFLINE": "1"}
        return forker.popen([str(program)], imports, flags=_ISOLATED, stdin=stdin, **options)
    own = [name for name in ("HF_HOME", "HF_ENDPOINT") if env.get(name) != os.environ.get(name)]
    if own and not _leaves_hub(imports):
        return subprocess.Popen([sys.executable, *_ISOLATED, str(program)], stdin=stdin, **options)
    return forker.popen([str(program)], imports, flags=_ISOLATED, stdin=stdin, **options)
