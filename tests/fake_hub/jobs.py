"""Jobs and buckets of the loopback Hub, as huggingface_hub 2.4 asks for them.

Answers have the keys that the client reads (``_jobs_api.py``, ``_buckets.py``); what a request may hold is what it
sends. Nothing is run: a test writes beforehand what a job will have said and how it ends (``plan_job``), and looks at
the request that arrived (``jobs``). A job is over when its log has been sent whole. Values of secrets are kept apart,
for the tests: no answer holds them.

What it does not prove: that the real Hub takes such requests and answers like this; what its messages say; when it
tries again, and what the log looks like then; what a mounted volume does.
"""

from __future__ import annotations

import json
from typing import Any

from fake_hub.access import caller, may_create, writer
from fake_hub.browse import object_id
from fake_hub.state import HubState, now
from fake_hub.wire import Exchange, Failure, Routes

routes = Routes()

HARDWARE: list[dict[str, Any]] = [
    {
        "name": name,
        "prettyName": name,
        "cpu": cpu,
        "ram": ram,
        "ephemeralStorage": disk,
        "accelerator": gpu
        and {"type": "gpu", "model": gpu, "quantity": "1", "vram": "24 GB", "manufacturer": "Nvidia"},
        "unitCostMicroUSD": cost,
        "unitCostUSD": cost / 1e6,
        "unitLabel": "minute",
    }
    for name, cpu, ram, disk, gpu, cost in [
        ("cpu-basic", "2 vCPU", "16 GB", "50 GB", None, 167),
        ("cpu-xl", "16 vCPU", "124 GB", "1000 GB", None, 16667),
        ("l4x1", "8 vCPU", "30 GB", "400 GB", "L4", 13333),
    ]
]
_ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")


def plan_job(state: HubState, lines: list[str], stage: str = "COMPLETED", **ends: Any) -> None:
    """What the next job says and how it ends: ``message``, ``running_secs``; ``readers``: of its log, till it ends;
    ``scheduling``: how often it is asked for till it has a machine."""
    state.disk.write(state.root / "jobs" / "next.json", {"lines": lines, "stage": stage, **ends})


def jobs(state: HubState) -> list[dict[str, Any]]:
    """Every job that was started: the request as ``spec``, its secrets, and what is known of it."""
    found: list[dict[str, Any]] = state.disk.read(state.root / "jobs" / "jobs.json", [])
    return found


def add_bucket(state: HubState, bucket: str, *, private: bool = True) -> None:
    """A bucket without files."""
    with state.disk.lock():
        state.disk.write(state.root / "jobs" / "buckets.json", {**_buckets(state), bucket: {"private": private}})


def _save(state: HubState, found: list[dict[str, Any]]) -> None:
    state.disk.write(state.root / "jobs" / "jobs.json", found)


def _buckets(state: HubState) -> dict[str, Any]:
    found: dict[str, Any] = state.disk.read(state.root / "jobs" / "buckets.json", {})
    return found


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """A job as the Hub tells of it: secrets by their names alone."""
    spec = job["spec"]
    return {
        "id": job["id"],
        "createdAt": job["created"],
        "dockerImage": spec.get("dockerImage"),
        "command": spec["command"],
        "arguments": spec["arguments"],
        "environment": spec["environment"],
        "secrets": dict.fromkeys(job["secrets"], ""),
        "flavor": spec["flavor"],
        "labels": spec.get("labels"),
        "volumes": spec.get("volumes"),
        "status": {"stage": job["stage"], "message": job["message"]},
        "durations": {"schedulingSecs": 1, "runningSecs": job["running_secs"], "totalSecs": job["running_secs"] + 1},
        "owner": {"id": object_id(job["namespace"]), "name": job["namespace"], "type": "user"},
        "retry": spec.get("attempts", 1) - 1,
    }


def _open(exchange: Exchange, namespace: str) -> HubState:
    """Whoever may see the jobs of a namespace. Raises Failure."""
    token, state = caller(exchange), exchange.site.state
    if token is None or state.accounts.role(token.user, namespace) is None:
        raise Failure(401 if token is None else 403, None, f"no access to the jobs of {namespace}")
    return state


def _find(exchange: Exchange, namespace: str, job_id: str) -> dict[str, Any]:
    state = _open(exchange, namespace)
    for job in jobs(state):
        if (job["namespace"], job["id"]) == (namespace, job_id):
            return job
    raise Failure(404, "JobNotFound", f"Job not found: {job_id}")


def _change(state: HubState, job_id: str, **changes: Any) -> None:
    with state.disk.lock():
        _save(state, [{**job, **changes} if job["id"] == job_id else job for job in jobs(state)])


@routes.add("GET", "api/jobs/hardware")
def hardware(exchange: Exchange) -> None:
    exchange.answer(HARDWARE)


@routes.add("POST", "api/jobs/{namespace}")
def start(exchange: Exchange, namespace: str) -> None:
    spec, token, state = exchange.json_body(), writer(exchange), exchange.site.state
    if not may_create(state, token, namespace):
        raise Failure(403, None, f"{token.user} may not start jobs for {namespace}")
    if spec["flavor"] not in {flavor["name"] for flavor in HARDWARE}:
        raise Failure(400, None, f"Invalid flavor: {spec['flavor']}")
    for volume in spec.get("volumes", []):
        _check_volume(state, volume)
    secrets = spec.pop("secrets", {})
    with state.disk.lock():
        known = jobs(state)
        script = state.disk.read(state.root / "jobs" / "next.json", {"lines": [], "stage": "COMPLETED"})
        job = {
            "id": object_id(f"job {len(known)}"),
            "namespace": namespace,
            "created": now(),
            "spec": spec,
            "secrets": secrets,
            "stage": "SCHEDULING" if script.get("scheduling") else "RUNNING",
            "polls": script.get("scheduling", 0),
            "message": None,
            "running_secs": 60,
            "readers": script.get("readers", 1),
            "script": script,
        }
        _save(state, [*known, job])
    exchange.answer(_answer(job))


def _check_volume(state: HubState, volume: dict[str, Any]) -> None:
    """A volume that cannot be mounted. Raises Failure."""
    if volume["type"] == "bucket" and volume["source"] not in _buckets(state):
        raise Failure(400, None, f"Bucket not found: {volume['source']}")
    if volume["type"] == "model" and state.resolve(volume["source"], volume.get("revision", "main")) is None:
        raise Failure(400, None, f"Model not found: {volume['source']}")


@routes.add("GET", "api/jobs/{namespace}")
def listing(exchange: Exchange, namespace: str) -> None:
    state = _open(exchange, namespace)
    stages, labels = exchange.params.get("stage"), exchange.params.get("label", [])
    found = [
        _answer(job)
        for job in jobs(state)
        if job["namespace"] == namespace
        and (stages is None or job["stage"] in stages)
        and all(label in {f"{k}={v}" for k, v in job["spec"].get("labels", {}).items()} for label in labels)
    ]
    exchange.page(found, state.options.page_size)


@routes.add("GET", "api/jobs/{namespace}/{job_id}")
def inspect(exchange: Exchange, namespace: str, job_id: str) -> None:
    job = _find(exchange, namespace, job_id)
    exchange.answer(_answer(job))
    if job["stage"] == "SCHEDULING":
        _change(
            exchange.site.state, job_id, polls=job["polls"] - 1, stage="SCHEDULING" if job["polls"] > 1 else "RUNNING"
        )


@routes.add("GET", "api/jobs/{namespace}/{job_id}/logs")
def logs(exchange: Exchange, namespace: str, job_id: str) -> None:
    job = _find(exchange, namespace, job_id)
    script = job["script"]
    if job["stage"] == "SCHEDULING":
        raise Failure(404, None, "this job has no log yet")
    lines = ["===== Job started at 2026-12-01 00:00:00 =====", *script["lines"]]
    events = [json.dumps({"timestamp": now(), "data": line}) for line in lines]
    body = "".join(f"data: {event}\n\n" for event in events) + ": keep-alive\n\n"
    exchange.send(200, body.encode(), {"Content-Type": "text/event-stream"})
    if exchange.fault is not None or job["stage"] in _ENDED:
        return
    if job["readers"] > 1:
        _change(exchange.site.state, job_id, readers=job["readers"] - 1)
    else:
        ends = {key: script[key] for key in ("message", "running_secs") if key in script}
        _change(exchange.site.state, job_id, stage=script["stage"], **ends)


@routes.add("POST", "api/jobs/{namespace}/{job_id}/cancel")
def cancel(exchange: Exchange, namespace: str, job_id: str) -> None:
    writer(exchange)
    _find(exchange, namespace, job_id)
    _change(exchange.site.state, job_id, stage="CANCELED")
    exchange.answer({})


@routes.add("POST", "api/buckets/{namespace}/{name}")
def create_bucket(exchange: Exchange, namespace: str, name: str) -> None:
    body, token, state = exchange.json_body(), writer(exchange), exchange.site.state
    if not may_create(state, token, namespace):
        raise Failure(403, None, f"{token.user} may not create buckets under {namespace}")
    answer = {"url": f"{exchange.site.hub}/buckets/{namespace}/{name}"}
    if f"{namespace}/{name}" in _buckets(state):
        raise Failure(409, None, "You already created this bucket", more=answer)
    add_bucket(state, f"{namespace}/{name}", private=body.get("visibility") == "private")
    exchange.answer(answer)


@routes.add("GET", "api/buckets/{namespace}/{name}")
def bucket(exchange: Exchange, namespace: str, name: str) -> None:
    found = _buckets(_open(exchange, namespace)).get(f"{namespace}/{name}")
    if found is None:
        raise Failure(404, "RepoNotFound", "Bucket not found")
    answer = {"id": f"{namespace}/{name}", "private": found["private"], "createdAt": now(), "size": 0, "totalFiles": 0}
    exchange.answer(answer)
