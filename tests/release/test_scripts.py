"""Scripts that make a release, by what is documented alone: every exit code, on the loopback Hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault
from helpers.checkpoints import build_llama
from helpers.documents import check_document
from helpers.forking import Forker
from helpers.on_path import write_command

HERE = Path(__file__).parent
TOKEN = "hf_theTokenOfTheTests0123456789abcdefgh"
FILE = """
name = "Tiny"
source = "model"
repo = "{owner}/tiny-{variant}"
license = "mit"

[defaults]
device = "cpu"
min_quantized = 0

[[variants]]
scheme = "int8wo"

[[variants]]
scheme = "intx2wo"

[gates]
min_sqnr_db = 20
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the scripts run: a model, and its release file."""
    build_llama(tmp_path / "work/model")
    (tmp_path / "work/tiny.toml").write_text(FILE)
    return tmp_path / "work"


@pytest.fixture
def start(hub_client: HubClient, folder: Path, tmp_path: Path, forker: Forker) -> Iterator[Callable[..., Any]]:
    """Starts a script in ``folder``, with ``aoconvert`` on its ``PATH`` and a token."""
    hub_client.hub.state.add_user("me", TOKEN)
    env = hub_client.environment({**write_command(tmp_path / "bin", forker), "HF_TOKEN": TOKEN})
    started: list[subprocess.Popen[str]] = []

    def begin(script: str, *words: str, **changes: str) -> subprocess.Popen[str]:
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [str(HERE / script), "tiny.toml", *words]
        started.append(subprocess.Popen(command, cwd=folder, env={**env, **changes}, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()


@pytest.fixture
def run(start: Callable[..., Any]) -> Run:
    """Runs a script to its end."""

    def call(script: str, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        process = start(script, *words, **changes)
        out, err = process.communicate()
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    return call


def stop(process: subprocess.Popen[str], hub: HubClient, number: signal.Signals) -> str:
    """Stop a script, and all that a terminal would stop, while a commit is on its way; gives what it said."""
    while not hub.hub.requests("/validate-yaml"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate()
    assert "Traceback" not in err
    return out


def events(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, each as its schema has it."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for line in found:
        check_document("release-event" if "event" in line else "error", line)
    return found


def test_a_shell_script(run: Run, start: Callable[..., Any], folder: Path, hub_client: HubClient) -> None:
    hub, log = hub_client.hub, folder / "release.jsonl"
    (folder / "tiny.toml").write_text(FILE.replace("intx2wo", "nosuch").replace('"int8wo"', '"int8wo"\nskip = ["no"]'))
    done = run("release.sh", "me")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1] == "refused, nothing was done: correct the release file"
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()[:-1]] == ["error:", "error:"]
    assert not (folder / "releases").exists()
    [only] = [line for line in events(log) if "error" in line]
    assert only["error"]["exit_code"] == 3 and len(only["error"]["problems"]) == 2

    (folder / "tiny.toml").write_text(FILE)
    hub.faults.append(Fault("/commit/", delay=1.5, times=1))
    out = stop(start("release.sh", "me"), hub_client, signal.SIGTERM)
    assert "stopped; the same command goes on" in out
    assert events(log)[-1]["error"]["type"] == "Interrupted"

    done = run("release.sh", "me")
    lines = done.stdout.splitlines()
    assert done.returncode == 4, done
    [published] = json.loads(hub.state.read("me/tiny-int8wo", "release.json"))["variants"]
    commit = published["commit"]  # that holds the weights; the head has this record too
    status, _, where = lines[0].partition(": ")
    name, url, found, _ = where.split()
    assert (status in ("pushed", "unchanged"), name, url, found) == (
        True,
        "int8wo",
        f"{hub.endpoint}/me/tiny-int8wo",
        commit,
    )
    assert lines[1].startswith("gate missed: intx2wo min-sqnr-db is ") and lines[1].endswith(", required 20.0")
    assert float(lines[1].split()[5].rstrip(",")) < 20
    assert lines[2:] == ["a variant is not good enough; the others are published"]
    assert hub.state.settings("me/tiny-intx2wo") is None
    made = {line["variant"]: line["again"] for line in events(log) if line["event"] == "quantized"}
    assert made == {"int8wo": False, "intx2wo": True}

    done = run("release.sh", "me", "--only", "int8*", RELEASE_LOG="other.jsonl")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all is published")
    assert [line["event"] for line in events(folder / "other.jsonl")][-2:] == ["unchanged", "summary"]

    done = run("release.sh", "others", "--only", "int8*")
    assert done.returncode == 5, done
    assert "may not create repos under others" in done.stdout
    events(log)


def test_a_python_script(run: Run, start: Callable[..., Any], folder: Path, hub_client: HubClient) -> None:
    hub, summary = hub_client.hub, folder / "release.md"
    hub.faults.append(Fault("/commit/", delay=1.5, times=1))
    out = stop(start("release.py", "me"), hub_client, signal.SIGINT)
    assert "int8wo: quantized\n" in out and "interrupted" in summary.read_text()

    # a Hub that is busy is asked again; one that refuses is not
    hub.faults.append(Fault("/whoami", status=503, skip=1, times=1))
    done = run("release.py", "me", "--wait", "0.01", "--", "--only", "int8*")
    assert done.returncode == 0, done
    assert "again in 0.01 s" in done.stdout
    assert summary.read_text() == f"# Tiny: ok\n\n- int8wo: {hub.endpoint}/me/tiny-int8wo\n- intx2wo: skipped\n"
    done = run("release.py", "others", "--", "--only", "int8*")
    assert done.returncode == 5 and "again in" not in done.stdout, done
    assert "me may not create repos under others" in summary.read_text()

    done = run("release.py", "me", "--", "--skip-push")
    assert done.returncode == 4, done
    assert "- intx2wo: not published: min-sqnr-db " in summary.read_text()
    assert "int8wo: quantized (by an earlier run)" in done.stdout

    (folder / "tiny.toml").write_text(FILE.replace("intx2wo", "nosuch"))
    assert run("release.py", "me").returncode == 3
    assert "nosuch" in summary.read_text()
