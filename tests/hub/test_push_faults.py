"""Every way in which the Hub can fail a push: it completes, or it ends with one line, and the next run completes it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import pytest
from fake_hub.server import Fault
from helpers.forking import Forker
from pushing import Pusher, entries, problem, pusher

# endpoint → method, path
XET = {
    "xet-token": ("GET", "/xet-write-token/"),
    "xorb": ("POST", "/xorbs/"),
    "shard": ("POST", "/shards$"),
}
LFS = {
    "whoami": ("GET", "^/api/whoami-v2"),
    "create": ("POST", "^/api/repos/create"),
    "info": ("GET", "^/api/models/me/[^/]+$"),
    "tip": ("GET", "/revision/"),
    "auth": ("GET", "/auth-check"),
    "refs": ("GET", "/refs$"),
    "branch": ("POST", "/branch/"),
    "yaml": ("POST", "^/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "put": ("PUT", "^/upload/"),
    "verify": ("POST", "/objects/verify"),
    "commit": ("POST", "/commit/"),
    "tree": ("GET", "/tree/"),
    "tag": ("POST", "/tag/"),
    "discussions": ("GET", "/discussions"),
    "manifest": ("GET", "/resolve/"),
}
ENDPOINTS = {**LFS, **XET}
# The client repeats these for half a minute, where it is worth it.
REPEATED = {"preupload", "batch", "put", "verify", "tree"}
STATUSES = (401, 403, 404, 409, 413, 429, 500, 503)
FAILURES = (*STATUSES, "reset", "half", "lost")


@dataclass(frozen=True)
class Case:
    """One fault: where, what, how often; and what is in the repo before."""

    endpoint: str
    failure: int | str
    forever: bool = False

    @property
    def new(self) -> bool:
        """Whether the repo is to be made; else it holds an older checkpoint."""
        return self.endpoint in ("create", "yaml", "batch", "verify", *XET)

    @property
    def name(self) -> str:
        return f"{self.endpoint}-{self.failure}{'-always' if self.forever else ''}"

    @property
    def options(self) -> dict[str, object]:
        match self.endpoint:
            case "branch":
                return {"revision": "dev"}
            case "tag":
                return {"tag": "v1"}
            case "discussions":
                return {"create_pr": True}
            case _:
                return {}

    @property
    def fault(self) -> Fault:
        method, pattern = ENDPOINTS[self.endpoint]
        times = 1_000_000 if self.forever else 1
        match self.failure:
            case int(status):
                return Fault(pattern, method=method, status=status, times=times)
            case "reset":
                return Fault(pattern, method=method, reset=True, times=times)
            case "half" if method == "GET":
                return Fault(pattern, method=method, cut_after=10, reset=True, times=times)
            case "half":
                return Fault(pattern, method=method, reset_after=100, times=times)
            case _:
                return Fault(pattern, method=method, lose_answer=True, times=times)

    @property
    def slow(self) -> bool:
        waits = self.failure not in (401, 403, 404, 409, 413)
        return waits and self.endpoint in {*REPEATED, "commit", "yaml"}


EVERY = [Case(e, f, forever) for e in LFS for f in FAILURES for forever in (False, True)]
EVERY_XET = [Case(e, f, forever) for e in XET for f in FAILURES for forever in (False, True)]
# By default each endpoint with some failures of each sort, and what takes seconds only where it differs.
QUICK = [case for number, case in enumerate(EVERY) if not case.slow and number % 7 == 0]
CHOSEN = [
    *QUICK,
    *[Case("commit", failure) for failure in ("lost", "reset", "half", 503, 429)],
    *[Case("commit", failure, forever=True) for failure in ("lost", 500)],
    *[Case("put", failure) for failure in ("half", "lost", 503)],
    Case("batch", 429),
    *[Case("preupload", "reset"), Case("verify", "lost"), Case("tree", "half"), Case("yaml", 500)],
]
CHOSEN_XET = [
    *[Case(endpoint, failure, forever=True) for endpoint in ("xet-token", "xorb") for failure in (401, 404)],
    *[Case("shard", 403, forever=True), Case("xorb", "half"), Case("shard", "lost"), Case("xet-token", "lost")],
    *[Case("commit", "lost"), Case("commit", "reset", forever=True)],
]


def check(case: Case, me: Pusher, older: Path, folder: Path) -> None:
    """Push into a repo of its own with the fault, and then without."""
    repo, state = f"me/{case.name}", me.hub.state
    if not case.new:
        assert "value" in me.push(older, repo)
    before = entries(me.hub, repo)
    target = "dev" if case.endpoint == "branch" else "main"
    me.hub.faults.append(case.fault)
    outcome = me.push(folder, repo, **case.options)
    me.hub.faults.clear()
    if "error" in outcome:
        problem(outcome, 5)
        assert outcome["hint"]
    again = me.push(folder, repo, **case.options)
    assert "value" in again, again
    done = again["value"]
    if case.endpoint == "discussions":
        target = "refs/pr/1"
        assert "refs/pr/2" not in state.all_refs(repo)
    expected = {file["path"]: file["size"] for file in done["files"]}
    found = entries(me.hub, repo, target)
    assert {path: entry.size for path, entry in found.items() if path in expected} == expected
    assert done["nothing_to_do"] or "error" in outcome
    # every commit was either what was there before or the whole checkpoint, and nothing was committed twice
    sha = state.resolve(repo, target)
    assert sha is not None
    history = [dict(commit.entries) for commit in state.history(repo, sha)]
    assert history[0] == found
    assert history[1] == before or case.new
    assert sum(1 for commit in history if commit == found) == 1
    assert len(history) == (2 if case.new else 3)
    if case.endpoint == "tag":
        assert state.refs(repo)["v1"] == sha


def run(
    cases: list[Case], workers: int, root: Path, forker: Forker, older: Path, folder: Path, *, xet: bool = False
) -> list[str]:
    """Check cases side by side, because most of the time is spent waiting; what failed.

    With Xet each case has a Hub of its own: what one repo has, no other has to be sent.
    """
    assert len(set(cases)) == len(cases), "two cases would share a repo"
    queue: Queue[Case] = Queue()
    for case in sorted(cases, key=lambda case: not (case.slow and case.forever)):
        queue.put(case)
    checked: list[Case] = []
    failures: list[str] = []

    def work(number: int) -> None:
        # push writes the card into the folder
        own = [Path(shutil.copytree(place, root / str(number) / place.name)) for place in (older, folder)]
        for attempt in itertools.count():
            with pusher(root / str(number) / str(attempt), forker, xet=xet) as me:
                for case in itertools.islice(iter(queue.get_nowait, None), 1 if xet else None):
                    try:
                        check(case, me, *own)
                    except Exception as error:
                        failures.append(f"{case.name}: {error!r}"[:3000])
                    checked.append(case)

    def guarded(number: int) -> None:
        with contextlib.suppress(Empty):
            work(number)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(guarded, range(workers)))
    assert sorted(map(str, checked)) == sorted(map(str, cases))
    return failures


@pytest.fixture
def folders(fresh: Callable[[str], Path]) -> Iterator[tuple[Path, Path]]:
    yield fresh("older"), fresh("shards")


def test_faults(folders: tuple[Path, Path], forker: Forker, tmp_path: Path) -> None:
    failures = run(CHOSEN, 4, tmp_path / "hubs", forker, *folders)
    assert not failures, "\n".join(failures)


@pytest.mark.exhaustive
def test_faults_of_xet(folders: tuple[Path, Path], forker: Forker, tmp_path: Path) -> None:
    failures = run(CHOSEN_XET, 4, tmp_path / "hubs", forker, *folders, xet=True)
    assert not failures, "\n".join(failures)


@pytest.mark.exhaustive
def test_every_fault_of_xet(folders: tuple[Path, Path], forker: Forker, tmp_path: Path) -> None:
    failures = run(EVERY_XET, 8, tmp_path / "hubs", forker, *folders, xet=True)
    assert not failures, "\n".join(failures)


@pytest.mark.exhaustive
def test_every_fault(folders: tuple[Path, Path], forker: Forker, tmp_path: Path) -> None:
    failures = run(EVERY, 12, tmp_path / "hubs", forker, *folders)
    assert not failures, "\n".join(failures)
