"""``aoconvert push`` as a command: its streams, exit codes, JSON, and where the token is not."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault
from helpers.documents import check_document
from pushing import TOKEN, WITH_TOKEN, XET, entries

from aoconvert.cli.main import _without_token

Fresh = Callable[..., Path]
linux = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")


@pytest.fixture
def client(hub_client: HubClient) -> HubClient:
    hub_client.hub.state.add_user("me", TOKEN)
    return hub_client


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_the_three_outputs(client: HubClient, fresh: Fresh) -> None:
    folder = str(fresh())
    first = client.command("push", "me/x", folder, "--json", env=WITH_TOKEN)
    assert first.returncode == 0, first.stderr
    done = json.loads(first.stdout)
    check_document("push", done)
    assert {"repo_id", "url", "commit", "pr_url", "files", "bytes_uploaded"} <= set(done)
    assert {"nothing_to_do", "deleted", "warnings"} <= set(done)
    assert set(done["files"][0]) == {"path", "size", "sha256", "uploaded"}
    quiet = client.command("push", "me/x", folder, "-q", env=WITH_TOKEN)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, f"{client.hub.endpoint}/me/x\n", "")
    human = client.command("push", "me/x", folder, env=WITH_TOKEN)
    assert human.stdout.splitlines()[-1] == f"nothing to do: {client.hub.endpoint}/me/x holds exactly this"
    assert "warning: the licence is unknown" in human.stderr


def test_a_dry_run_touches_nothing(client: HubClient, fresh: Fresh) -> None:
    folder = fresh()
    before = listing(folder)
    done = client.command("push", "me/x", str(folder), "--dry-run", "--json", env=WITH_TOKEN)
    found = json.loads(done.stdout)
    check_document("push", found)
    assert found["dry_run"] is True
    assert found["commit"] is None
    assert not any(file["uploaded"] for file in found["files"]) and found["bytes_uploaded"] == 0
    assert found["to_upload"] == [file["path"] for file in found["files"]] and found["deleted"] == []
    assert found["bytes_to_upload"] == sum(file["size"] for file in found["files"])
    assert "me/x" in found["card"]
    assert client.hub.state.settings("me/x") is None
    assert {entry.method for entry in client.hub.log} == {"GET"}
    shown = client.command("push", "me/x", str(folder), "--dry-run", env=WITH_TOKEN).stdout
    assert "from_pretrained" in shown  # the card
    assert "pytorch_model-00001-of-00002.bin" in shown
    assert "nothing was changed" in shown.splitlines()[-1]
    assert listing(folder) == before


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, "there is no token"),
        ({**WITH_TOKEN, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({**WITH_TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, "could not be asked: Hugging Face Hub: cannot connect"),
    ],
    ids=["no token", "offline", "no network"],
)
def test_without_the_hub(client: HubClient, fresh: Fresh, env: dict[str, str], says: str) -> None:
    folder = str(fresh())
    dry = client.command("push", "me/x", folder, "--dry-run", "--json", env=env)
    assert dry.returncode == 0, dry.stderr
    assert says in " ".join(json.loads(dry.stdout)["warnings"])
    refused = client.command("push", "me/x", folder, "--json", env=env)
    assert refused.returncode == 5
    error = json.loads(refused.stdout)["error"]
    assert error["hint"]
    assert not client.hub.requests("create|commit")


def test_errors_are_one_line_and_a_hint(client: HubClient, fresh: Fresh) -> None:
    folder = fresh()
    wrong = client.command("push", "me/x", str(folder), env={"HF_TOKEN": "hf_somebodyElse"})
    assert wrong.returncode == 5
    first, second = wrong.stderr.splitlines()
    assert first.startswith("error: Hugging Face Hub: the Hub does not accept the token (401)")
    assert second.startswith("hint: log in with `hf auth login`")
    (folder / "config.json").unlink()
    several = client.command("push", "me/x/y", str(folder), env=WITH_TOKEN)
    assert several.returncode == 3
    assert [line.split(":")[0] for line in several.stderr.splitlines()] == ["error", "error"]
    client.hub.state.add_user("me", "hf_onlyReads", role="read")
    read = client.command("push", "you/x", str(fresh()), "--json", env={"HF_TOKEN": "hf_onlyReads"})
    assert read.returncode == 5
    error = json.loads(read.stdout)["error"]
    assert len(error["problems"]) == 2, error
    usage = client.command("push", "me/x", "--private", "--create-pr", "--tag", "v1", env=WITH_TOKEN)
    assert usage.returncode == 2


def test_the_token_is_nowhere(client: HubClient, fresh: Fresh, tmp_path: Path) -> None:
    """Not in the outputs, with tracebacks too, nor in a file that the command or the Hub keeps."""
    folder = fresh()
    env = {**WITH_TOKEN, "AOCONVERT_DEBUG": "1"}
    said = ""
    for fault in (None, Fault("/commit/", status=403), Fault("^/upload/", status=403), Fault("/whoami", reset=True)):
        if fault is not None:
            client.hub.faults.append(fault)
        done = client.command("push", f"me/x{len(said)}", str(folder), env=env)
        client.hub.faults.clear()
        assert done.returncode == (0 if fault is None else 5)
        said += done.stdout + done.stderr
    assert "Traceback" in said
    assert TOKEN not in said
    kept = [folder, client.home, client.hub.state.root / "blobs", client.hub.state.root / "repos"]
    files = [place for root in kept if root.exists() for place in root.rglob("*") if place.is_file()]
    assert files
    assert [place for place in files if TOKEN.encode() in place.read_bytes()] == []


@linux
@pytest.mark.parametrize("form", [["--token", TOKEN], [f"--token={TOKEN}"]], ids=["two words", "one word"])
def test_the_token_leaves_the_command_line(client: HubClient, fresh: Fresh, form: list[str]) -> None:
    client.hub.faults.append(Fault("/whoami", delay=0.5))
    with client.popen("push", "me/x", str(fresh()), "-q", *form, env={"HF_TOKEN": "hf_anotherOne"}) as process:
        while not client.hub.requests("/whoami"):
            assert process.poll() is None, process.communicate()
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
            time.sleep(0.01)
        assert b"push" in line
        assert not [word for word in line if TOKEN.encode() in word]
        assert process.wait(60) == 0
    assert {entry.token for entry in client.hub.requests("/whoami")} == {TOKEN}


@pytest.mark.parametrize(
    ("arguments", "kept", "token"),
    [
        (["push", "a/b", "--token", "X", "out"], ["push", "a/b", "out"], "X"),
        (["--token=X", "push"], ["push"], "X"),
        (["push", "--token", "X", "--token=Y"], ["push"], "Y"),
        (["push", "--token"], ["push", "--token"], None),
        (["push", "--", "--token", "X"], ["push", "--", "--token", "X"], None),
        (["push", "--tokens", "X"], ["push", "--tokens", "X"], None),
    ],
)
def test_arguments_without_the_token(arguments: list[str], kept: list[str], token: str | None) -> None:
    assert _without_token(arguments) == (kept, token)


def test_a_command_that_takes_no_token_says_so(client: HubClient) -> None:
    assert client.command("schemes", "--token", "X").returncode == 2


# by default each moment, and each signal
INTERRUPTED = {("^/upload/", signal.SIGINT), ("/commit/", signal.SIGTERM), ("/xorbs/", signal.SIGINT)}


@pytest.mark.parametrize(
    ("where", "number"),
    [
        pytest.param(*cell, marks=[] if cell in INTERRUPTED else pytest.mark.exhaustive)
        for cell in itertools.product(("^/upload/", "/commit/", "/xorbs/"), (signal.SIGINT, signal.SIGTERM))
    ],
)
def test_interrupted(client: HubClient, fresh: Fresh, number: signal.Signals, where: str) -> None:
    folder = str(fresh())
    client.hub.state.xet = where == "/xorbs/"
    env = XET if where == "/xorbs/" else WITH_TOKEN
    client.hub.faults.append(Fault(where, delay=1.5, times=1))
    before = {"^/upload/": "/objects/batch", "/commit/": "/validate-yaml", "/xorbs/": "/xet-write-token/"}
    with client.popen("push", "me/x", folder, env=env) as process:
        while not client.hub.requests(before[where]):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    said, hint = stderr.splitlines()
    assert ("the commit had been requested, and may exist" if where == "/commit/" else "nothing was committed") in said
    assert "run the same command again" in hint
    assert client.command("push", "me/x", folder, env=env).returncode == 0
    state = client.hub.state
    assert len(state.history("me/x", state.refs("me/x")["main"])) == 2


# --- a push that is killed


def moments(count: int) -> Iterator[tuple[str, int]]:
    """After how many requests to kill, spread over a push of ten requests and more."""
    for number in range(count):
        yield ("xet" if number % 2 else "lfs"), 2 + number * 13 % 17


def check_kills(client: HubClient, fresh: Fresh, count: int) -> None:
    client.hub.state.xet = True
    client.hub.faults.append(Fault("", delay=0.03))
    for number, (way, requests) in enumerate(moments(count)):
        repo, folder = f"me/{way}-{number}", fresh()
        env = {**WITH_TOKEN, **({"HF_HUB_DISABLE_XET": "0"} if way == "xet" else {})}
        seen = len(client.hub.log)
        with client.popen("push", repo, str(folder), env=env) as process:
            while len(client.hub.log) < seen + requests and process.poll() is None:
                time.sleep(0.005)
            process.kill()
        before = entries(client.hub, repo) if client.hub.state.settings(repo) is not None else {}
        done = client.command("push", repo, str(folder), "--json", env=env)
        assert done.returncode == 0, done.stderr
        found = entries(client.hub, repo)
        assert set(before) <= {".gitattributes"} or before == found
        assert {file["path"] for file in json.loads(done.stdout)["files"]} == set(found) - {".gitattributes"}
        state = client.hub.state
        assert len(state.history(repo, state.refs(repo)["main"])) == 2


def test_killed(client: HubClient, fresh: Fresh) -> None:
    check_kills(client, fresh, 4)


@pytest.mark.exhaustive
def test_killed_at_many_moments(client: HubClient, fresh: Fresh) -> None:
    check_kills(client, fresh, 20)


def test_push_help_names_no_heavy_import() -> None:
    code = "import sys; from aoconvert.cli import push; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_push_imports_no_library(client: HubClient, fresh: Fresh) -> None:
    script = (
        "from aoconvert import push\n"
        f"push('me/x', {str(fresh('pipeline'))!r})\n"
        "result = sorted({'torch', 'torchao', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules))"
    )
    assert client.run(script, env=WITH_TOKEN, fresh=True) == []
