"""A release as a job on Hugging Face: the plan, the request, the log, the end; and what the job itself does.

The Hub is the one on loopback, asked by the real client. What the job runs is run here, from the request that arrived,
with folders in the places of its volumes.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.jobs import jobs, plan_job
from fake_hub.server import Fault
from helpers.checkpoints import build_llama
from helpers.documents import check_document
from helpers.forking import WITHOUT_HUB

from aoconvert.releasing.engines.hf_jobs.lines import to_lines

TOKEN = "hf_theTokenOfTheTests0123456789abcdefgh"

FILE = """
name = "Tiny"
source = "org/tiny"
repo = "{owner}/tiny-{variant}"
owner = "me"
license = "mit"

[defaults]
device = "cpu"
min_quantized = 0

[[variants]]
scheme = "int8wo"

[[variants]]
recipe = "recipes/mixed.toml"

[gates]
min_sqnr_db = 20
"""
RECIPE = """
default = "int8wo"

[[rule]]
match = 're:.*self_attn.*'
scheme = "skip"
"""


@dataclass
class Office:
    """A client that starts jobs, and a release file whose source is on the Hub."""

    client: HubClient
    folder: Path

    @property
    def state(self) -> Any:
        return self.client.hub.state

    def command(self, *options: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        """``release --engine hf-jobs``."""
        file = str(self.folder / "tiny.toml")
        return self.client.command("release", file, "--engine", "hf-jobs", *options, token=token)

    def documents(self, *options: str, code: int = 0) -> list[dict[str, Any]]:
        """What it prints with ``--json``, at an exit code."""
        done = self.command(*options, "--json")
        assert done.returncode == code, done.stderr + done.stdout
        return [json.loads(line) for line in done.stdout.splitlines()]

    def run(self, script: str, **told: Any) -> Any:
        """Run a script after ``SCRIPT``, as ``HubClient.run`` does; it is told what is given here."""
        told |= {"path": str(self.folder / "tiny.toml"), "state": str(self.state.root)}
        env = {"HF_TOKEN": TOKEN, "TESTS": str(Path(__file__).parents[1])}
        return self.client.run(SCRIPT + script, env=env, stdin=json.dumps(told))

    def start_job(self, machine: Path, spec: dict[str, Any], secrets: dict[str, str]) -> Any:
        """Do what a job would do: an attempt on a new machine, whose volumes are folders below ``machine``."""
        environment = {**spec["environment"], **secrets}
        for volume in spec["volumes"]:
            place = machine / volume["mountPath"].lstrip("/")
            if volume["type"] == "model" and not place.exists():
                commit = self.state.resolve(volume["source"], volume["revision"])
                for path in self.state.entries(volume["source"], commit):
                    (place / path).parent.mkdir(parents=True, exist_ok=True)
                    (place / path).write_bytes(self.state.read(volume["source"], path))
            place.mkdir(parents=True, exist_ok=True)
        for name in ("AOCONVERT_JOB_BUCKET", "AOCONVERT_JOB_SOURCES"):
            environment[name] = str(machine / environment[name].lstrip("/"))
        disk = tempfile.mkdtemp(dir=machine)  # of its own: what an attempt started may outlive it for a moment
        assert spec["command"][-3:-1] == ["python", "-m"]
        code = f"import importlib, os, sys; os.chdir({disk!r}); "
        code += f"sys.exit(importlib.import_module({spec['command'][-1]!r}).main())"
        assert self.client.forker is not None
        imports = WITHOUT_HUB + self.client.forker.fork_children_of_verify()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
        environment = self.client.environment(environment)
        return self.client.forker.popen(["-c", code], imports, env=environment, **pipes)


@pytest.fixture
def office(hub_client: HubClient, tmp_path: Path) -> Office:
    model = build_llama(tmp_path / "model")
    state = hub_client.hub.state
    state.add_user("me", TOKEN)
    state.create_repo("org/tiny")
    state.commit("org/tiny", {path.name: path for path in model.iterdir()})
    folder = tmp_path / "releases"
    (folder / "recipes").mkdir(parents=True)
    (folder / "tiny.toml").write_text(FILE)
    (folder / "recipes/mixed.toml").write_text(RECIPE)
    return Office(hub_client, folder)


def say(*documents: dict[str, Any]) -> list[str]:
    """Documents as a job prints them."""
    return [line for document in documents for line in to_lines(document)]


def record(status: str = "unchanged", exit_code: int | None = None) -> dict[str, Any]:
    """The summary of a release of one variant."""
    error = {"type": "HubError", "message": "no", "hint": None, "exit_code": exit_code} if exit_code else None
    variant = {"name": "int8wo", "model": "tiny", "scheme": "int8wo", "status": status, "error": error}
    ok = status not in ("failed", "gate_failed")
    models = [{"name": "tiny", "source": "org/tiny", "revision": "1" * 40}]
    return {"event": "summary", "schema_version": 1, "name": "Tiny", "models": models, "ok": ok, "variants": [variant]}


STARTED = {"event": "job_started"}


def test_without_confirm_nothing_is_sent_but_questions(office: Office) -> None:
    [*planned, plan] = office.documents()
    assert [event["event"] for event in planned] == ["planned", "planned"]
    check_document("release-job", plan)
    assert (plan["flavor"]["name"], plan["flavor"]["usd_per_hour"]) == ("cpu-basic", 0.01002)
    assert (plan["timeout_seconds"], plan["attempts"], plan["max_cost_usd"]) == (3600, 1, 0.01)
    assert (plan["prices"]["origin"], plan["bucket"]["exists"], plan["running"]) == ("hub", False, None)
    assert plan["dependencies"][0] == f"aoconvert=={version('aoconvert')}"
    office.client.hub.faults.append(Fault("api/jobs/hardware", status=503))
    shown = office.command("--flavor", "a100-large", "--timeout", "90m", "--attempts", "3")
    assert shown.returncode == 0, shown.stderr
    assert "a100-large: 12 cores, 142.00 GB of memory" in shown.stdout
    assert (
        "$11.25 (1.5 h x 3 attempts; prices of 2026-12-01, https://huggingface.co/docs/hub/jobs-pricing)"
        in shown.stdout
    )
    assert "the Hub did not tell its prices" in shown.stderr and "Nothing was started" in shown.stdout
    assert {entry.method for entry in office.client.hub.log} <= {"GET", "HEAD"}
    assert jobs(office.state) == []


def test_the_request_and_what_the_job_said(office: Office) -> None:
    long = {"event": "verified", "variant": "int8wo", "again": True, "ok": True, "failed": ["x" * 20_000]}
    lines = ["Installed 80 packages", *say(STARTED, long), f"a line with {TOKEN}", *say(record("gate_failed"))]
    plan_job(office.state, lines, "ERROR", message="Job failed with exit code: 4")
    git = "aoconvert @ git+https://example.org/aoconvert"
    options = [
        "--confirm",
        "--requirement",
        git,
        "--flavor",
        "cpu-xl",
        "--timeout",
        "2h",
        "--attempts",
        "2",
        "--bucket",
        "kept",
        "--json",
    ]
    done = office.command(*options, "--only", "int8wo")
    assert done.returncode == 4, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["planned", "job_planned", "job_submitted", "job_started", "verified", "summary"]
    assert [event["event"] for event in events] == names
    for event in events:
        check_document("release-event", event)
    assert events[4] == long and events[-1]["variants"][0]["status"] == "gate_failed"
    assert "Installed 80 packages" in done.stderr
    [job] = jobs(office.state)
    spec = job["spec"]
    assert (spec["flavor"], spec["timeoutSeconds"], spec["attempts"]) == ("cpu-xl", 7200, 2)
    commit = office.state.resolve("org/tiny", "main")
    mount = f"/aoconvert/sources/org--tiny--{commit[:12]}"
    source = {"type": "model", "source": "org/tiny", "mountPath": mount, "revision": commit, "readOnly": True}
    bucket = {"type": "bucket", "source": "me/kept", "mountPath": "/aoconvert/bucket"}
    assert spec["volumes"] == [source, bucket]
    assert spec["command"][:4] == ["uv", "run", "--with", git] and f"torchao=={version('torchao')}" in spec["command"]
    order = json.loads(spec["environment"]["AOCONVERT_JOB"])
    assert order["files"]["tiny.toml"] == FILE and order["options"]["only"] == ["int8wo"]
    assert job["secrets"] == {"HF_TOKEN": TOKEN}
    for place in (json.dumps(spec), done.stdout, done.stderr):
        assert TOKEN not in place


def test_a_job_that_is_killed_goes_on_from_the_bucket(office: Office, tmp_path: Path) -> None:
    plan_job(office.state, say(STARTED, record()))
    assert office.command("--confirm").returncode == 0
    [job] = jobs(office.state)
    with office.start_job(tmp_path / "machine", job["spec"], job["secrets"]) as process:
        assert process.stdout is not None
        first = [json.loads(process.stdout.readline())]
        while len(first) < 2 or first[-2]["event"] != "quantized":
            first.append(json.loads(process.stdout.readline()))
        process.kill()
    assert first[1] == {"event": "restored", "variants": []}
    asked = len(office.client.hub.log)
    with office.start_job(tmp_path / "machine", job["spec"], job["secrets"]) as process:
        out, err = process.communicate()
    assert process.returncode == 0, out + err
    events = [json.loads(line) for line in out.splitlines()]
    assert events[1] == {"event": "restored", "variants": ["int8wo"]}
    for event in events[1:]:
        check_document("release-event", event)
    done = {event["variant"]: event["again"] for event in events if event["event"] == "quantized"}
    assert done == {"int8wo": False, "mixed": True}
    variants = {variant["name"]: variant for variant in events[-1]["variants"]}
    commit = office.state.resolve("org/tiny", "main")
    for name in ("int8wo", "mixed"):
        assert (variants[name]["status"], variants[name]["revision"]) == ("pushed", commit)
        manifest = json.loads(office.state.read(f"me/tiny-{name}", "aoconvert.json"))
        assert (manifest["source"]["repo_id"], manifest["source"]["revision"]) == ("org/tiny", commit)
    kept = json.loads((tmp_path / "machine/aoconvert/bucket/tiny/release.json").read_text())
    assert {**kept, "event": "summary"} == events[-1]
    assert "2 published" in (tmp_path / "machine/aoconvert/bucket/tiny/release.html").read_text()
    # the source came from where it is mounted, not by the network
    assert not [entry for entry in office.client.hub.log[asked:] if "org/tiny" in entry.path]


SCRIPT = """
import os
sys.path.insert(0, os.environ["TESTS"])
from pathlib import Path
from fake_hub.jobs import plan_job as script_job
from fake_hub.state import HubState
from aoconvert.options.jobs import JobOptions
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.engines.hf_jobs import plan_job, release_as_job, submit

told = json.load(sys.stdin)
path, state = Path(told["path"]), HubState(Path(told["state"]))
options = ReleaseOptions(only=("int8wo",), token=os.environ["HF_TOKEN"])

def made(**job):
    return plan_job(path, options, JobOptions(**job), lambda event: None)

def followed(plan, on_log=lambda line: None):
    events = []
    def call():
        record = submit(plan, events.append, on_log)
        return record.exit_code
    return {**attempt(call), "events": events}
"""


def test_how_a_job_ends(office: Office) -> None:
    """Exit code and message: from the last document of the last attempt, else from what the Hub says."""
    refused = {"type": "PlanError", "message": "1 problem: x", "hint": "h", "exit_code": 3, "problems": ["x", "y"]}
    stopped = {"error": {"type": "Interrupted", "message": "stopped", "hint": None, "exit_code": 130}}
    hub = {"error": {"type": "HubError", "message": "busy", "hint": None, "exit_code": 5, "retryable": True}}
    cases: list[tuple[list[str], str, dict[str, Any], int, str]] = [
        (say(STARTED, record()), "COMPLETED", {}, 0, ""),
        (say(STARTED, record("failed", 5)), "ERROR", {}, 5, ""),
        (say(STARTED, {"error": refused}), "ERROR", {}, 3, ": y"),
        (say(STARTED, hub), "ERROR", {}, 5, "busy"),
        # the first attempt failed, the second was stopped in the middle
        (say(STARTED, hub, STARTED), "ERROR", {"message": "Job timeout"}, 1, "its time was up"),
        (say(STARTED, stopped), "ERROR", {"running_secs": 3600}, 1, "its time was up"),
        (say(STARTED, stopped), "CANCELED", {}, 1, "was cancelled"),
        (["pulling"], "ERROR", {"message": "Job failed with exit code: 137"}, 1, "before its end (ERROR): Job failed"),
        (say(STARTED), "COMPLETED", {"scheduling": 1}, 1, "gave no record"),
        (say(STARTED, hub, STARTED, record()), "COMPLETED", {}, 0, ""),
    ]
    script = """
plan = made()
result = []
for lines, stage, ends, *_ in told["cases"]:
    script_job(state, lines, stage, **ends)
    result.append(followed(plan))
"""
    found = office.run(script, cases=cases)
    for got, (_, _, _, code, said) in zip(found, cases, strict=True):
        assert got.get("exit_code", got.get("value")) == code, got
        assert said in got.get("message", ""), got
    assert [got.get("hint", "").startswith("the same command goes on") for got in found[4:7]] == [True] * 3
    assert found[7]["hint"].startswith("exit code 137 is often too little memory")
    assert [event.get("attempt") for event in found[9]["events"]] == [None, 1, 2]


def test_following_can_stop_and_begin_again(office: Office) -> None:
    script = """
def stop(line):
    raise KeyboardInterrupt

script_job(state, ["a line", *told["lines"]], readers=2)
stopped = followed(made(), stop)
again = made()
other = plan_job(path, ReleaseOptions(token=options.token), JobOptions(), lambda event: None)
result = [stopped, followed(other), again.running.same, followed(again), made().running]
"""
    stopped, other, same, again, none = office.run(script, lines=say(STARTED, record()))
    [job] = jobs(office.state)
    assert stopped["exit_code"] == 130 and f"job {job['id']}, which goes on and costs money" in stopped["message"]
    assert f"hf jobs cancel me/{job['id']}" in stopped["hint"]
    assert other["exit_code"] == 3 and "with another order" in other["message"]
    assert (same, again["value"], none) == (True, 0, None)
    assert again["events"][0]["job_id"] == job["id"] and not again["events"][0]["again"]
    assert len(office.client.hub.requests("^/api/jobs/me$", method="POST")) == 1


def test_what_the_hub_refuses(office: Office) -> None:
    """Whoever is refused knows whether a job may run, and the next call finds it."""
    post = {"pattern": "^/api/jobs/me$", "method": "POST", "times": 1}
    office.client.hub.faults += [
        Fault(**post, status=402),
        Fault(**post, status=403),
        Fault(**post, lose_answer=True),
        Fault("^/api/jobs/me/.*/logs", status=404, times=1),
        Fault("^/api/jobs/me/.*/logs", cut_after=150, times=1),
    ]
    plan_job(office.state, ["a line", *say(STARTED, record())])
    script = """
lines, result = [], []
for _ in range(3):
    result.append(followed(made()))
result += [made().running is not None, followed(made()), followed(made(), lines.append), lines]
"""
    unpaid, forbidden, lost, running, unseen, seen, lines = office.run(script)
    assert "me has no credit for jobs (402)" in unpaid["message"]
    assert "this token may not start jobs for me (403)" in forbidden["message"]
    assert "the job may have been started, and cost money" in lost["message"] and running
    assert "may go on, and cost money" in unseen["message"]
    assert [got["exit_code"] for got in (unpaid, forbidden, lost, unseen)] == [5] * 4
    # the connection broke in the middle of the log: no line comes twice
    assert (seen["value"], lines) == (0, ["a line"])
    assert len(jobs(office.state)) == 1


def test_what_this_machine_could_not_plan(office: Office) -> None:
    """A GPU that is not here, and schemes that are chosen by all weights, which are not here either."""
    text = FILE.replace('device = "cpu"', 'device = "cuda"').replace(
        'scheme = "int8wo"', 'scheme = "auto"\nmin_sqnr = 30'
    )
    (office.folder / "tiny.toml").write_text(text)
    plan = office.run(
        "options = ReleaseOptions(token=options.token)\nresult = made().to_dict(), made(flavor='cpu-xl').warnings"
    )
    assert (plan[0]["flavor"]["name"], plan[0]["needs"]["gpus"]) == ("l4x1", 1)
    assert plan[0]["flavor"]["reason"].endswith("(auto: device = cuda)")
    assert plan[1] == ["cpu-xl has no GPU"]
    assert not [entry for entry in office.client.hub.requests("safetensors", method="GET") if entry.range is None]


def test_what_cannot_be_a_job(office: Office, tmp_path: Path) -> None:
    office.state.add_user("reader", "hf_reader", role="read")
    local = FILE.replace("org/tiny", str(tmp_path / "model"))
    files = {
        "tiny": FILE,
        "local": local,
        "outside": FILE.replace("recipes/mixed", "../mixed"),
        "lpips": FILE + "max_lpips = 0.1",
        "secret": f"# {TOKEN}\n{FILE}",
        "xpu": FILE.replace('"cpu"', '"xpu"'),
    }
    for name, text in files.items():
        (office.folder / f"{name}.toml").write_text(text)
    calls: list[tuple[str, dict[str, Any], dict[str, Any], int, str]] = [
        ("tiny", {"flavor": "cpu-huge"}, {}, 2, "there is no flavor 'cpu-huge'; there are cpu-basic, cpu-xl, l4x1"),
        ("tiny", {"bucket": "a/b/c"}, {}, 2, "is not the name of a bucket"),
        ("tiny", {"namespace": "others"}, {}, 5, "me cannot run jobs for others"),
        ("tiny", {"confirm": True}, {"dry_run": True}, 2, "exclude each other"),
        ("tiny", {}, {"only": ["fp4"]}, 2, "has no such variant"),
        ("tiny", {}, {"owner": "others"}, 5, "me may not create repos under others"),
        ("tiny", {}, {"token": "hf_unknown"}, 5, "does not accept the token"),
        ("local", {}, {}, 3, "is on this machine, where a job cannot read it: push it to the Hub first"),
        ("outside", {}, {}, 3, "mixed: ../mixed.toml is not beside the release file"),
        ("secret", {}, {}, 3, "secret.toml line 1 holds the Hub token in use"),
        ("tiny", {"requirement": "aoconvert @ git+https://x:y@example.org/a"}, {}, 3, "holds a user name or password"),
        ("lpips", {}, {}, 3, "the gate max_lpips needs the weights of LPIPS"),
        ("xpu", {}, {}, 3, "Hugging Face Jobs have no xpu"),
    ]
    script = """
result = []
for name, job, options, *_ in told["calls"]:
    options = {"token": os.environ["HF_TOKEN"], **options}
    call = lambda: release_as_job(path.with_stem(name), JobOptions(**job), **options)
    result.append(attempt(call))
del os.environ["HF_TOKEN"]
result.append(attempt(lambda: release_as_job(path, JobOptions())))
"""
    *found, without = office.run(script, calls=calls)
    for got, (*_, code, said) in zip(found, calls, strict=True):
        assert got.get("exit_code") == code and said in f"{got['message']}; {got['hint']}", got
    assert without["exit_code"] == 5 and "there is no token" in without["message"]
    assert {entry.method for entry in office.client.hub.log} <= {"GET", "HEAD"}
