"""How tests use the loopback Hub.

``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` are read when huggingface_hub is imported, so a test runs a small
script in a process of its own, with a fresh ``HF_HOME``. It is forked where all of aoconvert and torchao is imported,
and huggingface_hub is not. The fixture ``hub_client`` is a running Hub and a client for it::

    def test_pin(hub_client):
        hub_client.hub.state.create_repo("user/model")
        sha = hub_client.hub.state.commit("user/model", {"config.json": b"{}"})
        assert hub_client.run("result = resolve('user/model').revision") == sha

    def test_push(hub_client):
        hub_client.hub.state.add_user("me", "hf_x")
        assert hub_client.command("push", "me/model", "out", token="hf_x").returncode == 0
        assert hub_client.hub.state.read("me/model", "config.json") == b"{}"
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers.forking import WITHOUT_HUB, Forker

from fake_hub.server import LoopbackHub

REPO = Path(__file__).parents[2]

# What every script can use: resolve, HubOptions, find_weights, entries(); attempt() turns an error into a dict.
PRELUDE = """
import json, sys, traceback
from aoconvert.errors import AoconvertError
from aoconvert.formats.safetensors.header import header_of
from aoconvert.options import HubOptions
from aoconvert.sources import find_weights, resolve

def entries(source, path):
    header = header_of(source, path)
    return {name: [entry.dtype, entry.shape, entry.begin, entry.end] for name, entry in header.entries.items()}

def attempt(call):
    try:
        return {"value": call()}
    except AoconvertError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint,
                "exit_code": error.exit_code, "traceback": traceback.format_exc()}

result = None
"""


@dataclass
class HubClient:
    """A running Hub, and processes that use it through one cache.

    Attributes:
        hub: the server, its state, log and faults.
        home: ``HF_HOME`` of the client processes.
        forker: forks them; without it they are fresh interpreters.
        stderr: what the last process wrote there.
    """

    hub: LoopbackHub
    home: Path
    forker: Forker | None = None
    stderr: str = field(default="")

    def run(
        self,
        script: str,
        *,
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        stdin: str = "",
        fresh: bool = False,
    ) -> Any:
        """Run a script after the prelude; returns what it left in ``result``, by way of JSON.

        Args:
            env: changes to the environment.
            prefix: a command that runs the process, such as ``unshare``.
            stdin: what the script can read, for secrets.
            fresh: run it in an interpreter that has imported nothing.
        """
        code = f"{PRELUDE}\n{script}\nprint('\\n' + json.dumps(result))"
        done = self._run(["-c", code], env, stdin, prefix=prefix, fresh=fresh, timeout=180)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def command(
        self,
        *args: str,
        token: str | None = None,
        env: dict[str, str] | None = None,
        stdin: str = "",
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``aoconvert`` with these arguments, whatever comes of it.

        Args:
            token: what ``HF_TOKEN`` is set to.
            env: further changes to the environment.
            stdin: what the command can read.
            timeout: seconds until it is killed and the test fails.
        """
        return self._run(["-m", "aoconvert", *args], {**_token(token), **(env or {})}, stdin, timeout=timeout)

    def popen(
        self, *args: str, token: str | None = None, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start ``aoconvert`` with these arguments in a fresh interpreter, to be waited for or killed by the test.

        Args:
            token: what ``HF_TOKEN`` is set to.
            env: further changes to the environment.
            options: for ``subprocess.Popen``; without any, both outputs are pipes.
        """
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "aoconvert", *args]
        changes = {**_token(token), **(env or {})}
        return subprocess.Popen(command, env=self.environment(changes), **{**pipes, **options})

    def environment(self, changes: dict[str, str] | None = None) -> dict[str, str]:
        """What a client process sees: this Hub, this cache, no Xet, no other HF_ setting."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        ours = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(REPO),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return {**clean, **ours, **(changes or {})}

    def _run(
        self,
        words: list[str],
        env: dict[str, str] | None,
        stdin: str,
        *,
        prefix: Sequence[str] = (),
        fresh: bool = False,
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        environment = self.environment(env)
        if self.forker is not None and not prefix and not fresh:
            imports = WITHOUT_HUB + self.forker.fork_children_of_verify()
            done = self.forker.run(words, imports, input=stdin, timeout=timeout, env=environment)
        else:
            done = subprocess.run(
                [*prefix, sys.executable, *words],
                input=stdin,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        self.stderr = done.stderr
        return done


def _token(token: str | None) -> dict[str, str]:
    return {} if token is None else {"HF_TOKEN": token}


@pytest.fixture
def hub_client(tmp_path: Path, forker: Forker) -> Iterator[HubClient]:
    """A Hub without repos, and a client with an empty cache."""
    with LoopbackHub(tmp_path / "hub") as hub:
        yield HubClient(hub, tmp_path / "hf_home", forker)
