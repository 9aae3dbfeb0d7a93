"""Runs as a program: imports what its children need, then forks one for each request. It knows nothing of aoconvert.

``python forking_server.py SOCKET OWNER``; stdin holds the code that imports. It ends when the process ``OWNER`` does.
A request is one JSON value with three file descriptors (stdin, stdout, stderr) beside it: ``argv``, ``environment``,
``folder``, ``session`` (a session of its own, or else a process group). Answers: ``{"pid"}``, and when the child ended
``{"code", "seconds"}`` (of processor time).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

_MOST = 1 << 22  # bytes of a request


class Server:
    """The socket, the connections of which a child still runs, and a handle of each of these children."""

    def __init__(self, path: str, owner: int) -> None:
        self.selector = selectors.DefaultSelector()
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(path + ".new")
        self.listening.listen(64)
        Path(path + ".new").rename(path)  # who sees it can connect
        self.owner = os.pidfd_open(owner)
        self.children: dict[int, tuple[int, socket.socket]] = {}  # handle → process, connection
        self.selector.register(self.listening, selectors.EVENT_READ)
        self.selector.register(self.owner, selectors.EVENT_READ)

    def serve(self) -> tuple[dict[str, Any], list[int]]:
        """Fork for each request until the owner ends; returns in each child, with its request."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == self.owner:
                    os._exit(0)
                if key.fileobj is self.listening:
                    if (found := self.accept()) is not None:
                        return found
                else:
                    self.report(key.fd)

    def accept(self) -> tuple[dict[str, Any], list[int]] | None:
        """Fork for one request; what it was, in the child."""
        connection, _ = self.listening.accept()
        data, files, _, _ = socket.recv_fds(connection, _MOST, 3)
        while data and not data.endswith(b"\n"):
            data += connection.recv(_MOST)
        if not data:
            connection.close()
            return None
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            for handle, (_, other) in self.children.items():
                os.close(handle)
                other.close()
            self.selector.close()
            self.listening.close()
            connection.close()
            os.close(self.owner)
            return request, files
        if not request["session"]:
            with contextlib.suppress(OSError):  # it did so itself, or is gone
                os.setpgid(pid, 0)
        for file in files:
            os.close(file)
        handle = os.pidfd_open(pid)
        self.children[handle] = pid, connection
        self.selector.register(handle, selectors.EVENT_READ)
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        return None

    def report(self, handle: int) -> None:
        """Tell who asked how a child ended."""
        self.selector.unregister(handle)
        pid, connection = self.children.pop(handle)
        _, status, used = os.wait4(pid, 0)
        os.close(handle)
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(answer).encode() + b"\n")
        connection.close()


def become(request: dict[str, Any], files: list[int]) -> list[str]:
    """Make this process what was asked for; returns its words."""
    if request["session"]:
        os.setsid()
    else:
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
    words: list[str] = request["argv"]
    return words


def run(words: list[str]) -> int:
    """Run ``FILE …``, ``-m MODULE …`` or ``-c CODE …`` as the main program; its exit code."""
    try:
        match words:
            case ["-m", module, *rest]:
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", code, *rest]:
                sys.argv = ["-c", *rest]
                sys.modules["__main__"].__dict__.update(__name__="__main__")
                exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            case [file, *_]:
                sys.argv = list(words)
                runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Import, serve, and in each child run what was asked for."""
    exec(sys.stdin.read(), {"__name__": "imports"})
    gc.collect()
    gc.freeze()
    code = run(become(*Server(sys.argv[1], int(sys.argv[2])).serve()))
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
