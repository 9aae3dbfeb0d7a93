"""The loopback Hub: who may do what, what goes wrong, and its process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fake_hub.asking import HEAD, TOKEN, raw, run, sha256
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault, LoopbackHub
from fake_hub.store import address
from fake_hub.wire import Site

# Access


def test_who_may_do_what(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    for user in ("me", "you", "boss", "temp"):
        state.add_user(user, f"hf_{user}")
    state.add_user("me", "hf_reads", role="read")
    state.add_user("me", "hf_fine", role="fineGrained", scopes={"me/open": ["repo.content.read", "repo.write"]})
    state.add_org("org", {"boss": "admin", "you": "read", "temp": "contributor"})
    state.create_repo("me/open", initial_commit=True)
    state.create_repo("me/secret", private=True, initial_commit=True)
    state.create_repo("org/secret", private=True, initial_commit=True)
    found = run(
        hub_client,
        "names = ['me', 'reads', 'fine', 'you', 'boss', 'temp', 'nobody']\n"
        "apis = {name: HfApi(token=f'hf_{name}') for name in names} | {'stranger': HfApi(token=False)}\n"
        "def ask(call):\n"
        "    found = tried(call)\n"
        "    return [found['error'], found['status']] if isinstance(found, dict) and 'error' in found else 'ok'\n"
        "change = lambda path='x.bin': [add(path, b'1')]\n"
        "result = {}\n"
        "for repo in 'me/open', 'me/secret', 'org/secret':\n"
        "    for name, a in apis.items():\n"
        "        result[f'{name} {repo}'] = [\n"
        "            ask(lambda: a.repo_info(repo)), ask(lambda: a.auth_check(repo, write=True)),\n"
        "            ask(lambda: a.create_commit(repo, change(), commit_message='one')),\n"
        "            ask(lambda: a.create_commit(repo, change('y.bin'), commit_message='two', create_pr=True))]\n"
        "result['create'] = [ask(lambda: a.create_repo(f'org/by-{name}')) for name, a in apis.items()]\n"
        "result['exists'] = [ask(lambda: a.create_repo('me/open', exist_ok=True)) for name, a in apis.items()]\n"
        "result['twice'] = ask(lambda: apis['me'].create_repo('me/open'))\n"
        "result['own'] = ask(lambda: apis['temp'].create_commit('org/by-temp', change(), commit_message='m'))\n"
        "result['who'] = [tried(a.whoami) for a in apis.values() if a.token]",
    )
    ok, gone, refused = "ok", ["RepositoryNotFoundError", 404], ["HfHubHTTPError", 403]
    unknown, stranger = ["HfHubHTTPError", 401], ["RepositoryNotFoundError", 401]
    for name, wanted in {
        "me me/open": [ok, ok, ok, ok],
        "reads me/open": [ok, refused, refused, refused],
        "fine me/open": [ok, ok, ok, ok],
        "you me/open": [ok, refused, refused, ok],
        "nobody me/open": [unknown] * 4,
        "stranger me/open": [ok, unknown, unknown, unknown],
        "me me/secret": [ok, ok, ok, ok],
        "reads me/secret": [ok, refused, refused, refused],
        "fine me/secret": [gone] * 4,
        "you me/secret": [gone] * 4,
        "stranger me/secret": [stranger] * 4,
        "boss org/secret": [ok, ok, ok, ok],
        "temp org/secret": [ok, refused, refused, ok],
        "you org/secret": [ok, refused, refused, ok],
        "me org/secret": [gone] * 4,
    }.items():
        assert found[name] == wanted, name
    assert found["create"] == [refused, refused, refused, refused, ok, ok, unknown, unknown]
    # who may not create, and can see that the repo is there, is content with that
    assert found["exists"] == [ok, ok, ok, ok, ok, ok, unknown, ok]
    assert (found["twice"], found["own"]) == (["HfHubHTTPError", 409], ok)
    roles = [(who["name"], who["auth"]["accessToken"]["role"]) for who in found["who"][:-1]]
    assert roles[:3] == [("me", "write"), ("me", "read"), ("me", "fineGrained")]
    assert found["who"][2]["auth"]["accessToken"]["fineGrained"]["scoped"][0]["entity"]["name"] == "me/open"
    assert [(org["name"], org["roleInOrg"]) for org in found["who"][4]["orgs"]] == [("org", "admin")]
    assert found["who"][-1]["error"] == "HfHubHTTPError"
    answers = hub_client.hub.requests("me/open/preupload", method="POST")
    texts = {(answer.token, answer.query): answer.status for answer in answers}
    assert (texts[("hf_you", "")], texts[("hf_you", "create_pr=1")]) == (403, 200)


def test_the_kinds_of_repos_are_kept_apart(hub_client: HubClient) -> None:
    found = run(
        hub_client,
        "kinds = {'model': {}, 'dataset': {}, 'space': {'space_sdk': 'static'}}\n"
        "result = [str(api.create_repo('me/x', repo_type=kind, **more)) for kind, more in kinds.items()]\n"
        "for kind in kinds:\n"
        "    api.upload_file(repo_id='me/x', repo_type=kind, path_in_repo='w.bin', path_or_fileobj=kind.encode())\n"
        "result += [Path(api.hf_hub_download('me/x', 'w.bin', repo_type=kind)).read_text() for kind in kinds]\n"
        "api.update_repo_settings('me/x', private=True)\n"
        "result += [api.repo_info('me/x', repo_type=kind).private for kind in kinds]\n"
        "api.delete_repo('me/x')\n"
        "result += [api.repo_exists('me/x', repo_type=kind) for kind in kinds]",
    )
    assert [url.removeprefix(hub_client.hub.endpoint) for url in found[:3]] == [
        "/me/x",
        "/datasets/me/x",
        "/spaces/me/x",
    ]
    assert found[3:] == ["model", "dataset", "space", True, False, False, False, True, True]


# What goes wrong


def test_faults(hub_client: HubClient) -> None:
    """Each fault on one attempt of an upload, and what the repo and the log have of it."""
    hub, state = hub_client.hub, hub_client.hub.state
    state.create_repo("me/m", initial_commit=True)
    put: dict[str, Any] = {"method": "PUT", "server": "store", "times": 1}
    commit: dict[str, Any] = {"method": "POST", "times": 1}
    faults = [
        Fault("/commit/", status=409, headers={"X-Error-Message": "busy"}, body=b'{"error": "no"}', **commit),
        Fault("/commit/", reset=True, **commit),
        Fault("/commit/", reset_after=100, **commit),
        Fault("/commit/", lose_answer=True, **commit),
        Fault("/commit/", delay=0.3, **commit),
        Fault("/preupload/", status=413, skip=5, times=1),
    ]
    hub.faults += faults
    found = run(
        hub_client,
        "import time\n"
        "result = []\n"
        "for number in range(6):\n"
        "    start = time.monotonic()\n"
        "    one = tried(lambda: api.create_commit('me/m', [add(f'{number}', b'1' * 1000)], commit_message='m').oid)\n"
        "    result.append([one, time.monotonic() - start, len(api.list_repo_commits('me/m'))])",
    )
    (status, reset, cut, lost, late, large) = found
    assert (status[0]["status"], "busy" in status[0]["text"]) == (409, True)
    for outcome in (reset, cut, lost):
        assert outcome[0]["status"] is None and outcome[0]["error"] in (
            "ReadError",
            "WriteError",
            "RemoteProtocolError",
        )
    assert [outcome[2] for outcome in found] == [1, 1, 1, 2, 3, 3]  # lost is the answer, not the work
    assert late[1] > 0.3 and large[0]["status"] == 413
    log = hub.requests("/commit/")
    assert [(entry.status, entry.lost) for entry in log] == [(409, 0), (0, 0), (0, 0), (0, 200), (200, 0)]
    assert [entry.received for entry in log][1:3] == [0, 100]
    # the client tries again by itself: a lost answer to a PUT, a reset of another, and 429 with a time to wait
    hub.faults.clear()
    hub.faults += [
        Fault("/upload/", lose_answer=True, **put),
        Fault("/upload/", reset_after=1 << 20, **put),
        Fault("objects/batch", status=429, headers={"Retry-After": "0"}, times=1),
    ]
    run(
        hub_client,
        "files = [add('v.bin', b'v' * (3 << 20)), add('w.bin', b'w' * (3 << 20))]\n"
        "api.create_commit('me/m', files, commit_message='m')",
    )
    puts = [(entry.status, entry.lost, entry.received) for entry in hub.requests("/upload/")]
    assert sorted(puts) == [(0, 0, 1 << 20), (0, 200, 3 << 20), (200, 0, 3 << 20), (200, 0, 3 << 20)]
    assert [entry.status for entry in hub.requests("objects/batch")] == [429, 200]
    assert state.read("me/m", "v.bin") + state.read("me/m", "w.bin") == b"v" * (3 << 20) + b"w" * (3 << 20)


def test_a_body_that_is_wrong_or_ends_early_is_not_kept(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    state.create_repo("me/m")
    oid = sha256(b"whole")
    site = Site(state, hub_client.hub.endpoint, hub_client.hub.store, lambda: None)  # type: ignore[arg-type, return-value]
    target = urlsplit(address(site, f"/upload/models/me/m/{oid}", "PUT"))
    path = f"{target.path}?{target.query}"

    def put(body: bytes, path: str = path, length: str | None = "5") -> int:
        connection = HTTPConnection(target.netloc)
        connection.putrequest("PUT", path)
        if length is not None:
            connection.putheader("Content-Length", length)
        connection.endheaders(body)
        if len(body) < int(length or 0):
            connection.close()
            return 0
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    assert put(b"whole", path.replace("signature=", "signature=0")) == 403
    assert put(b"whole", path.replace(oid, "0" * 64)) == 403
    assert put(b"", length=None) == 501
    assert put(b"other") == 400
    assert put(b"who") == 0
    deadline = time.monotonic() + 5
    while (broken := hub_client.hub.log[-1]).received != 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (broken.status, broken.received) == (0, 3)
    assert state.object("me/m", oid) is None and list((state.root / "blobs").iterdir()) == []
    assert put(b"whole") == 200
    assert state.object("me/m", oid) == {"size": 5, "xet_hash": None}


def test_a_killed_client_leaves_the_hub_as_it_was(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    state.add_user("me", TOKEN)
    state.create_repo("me/m", initial_commit=True)
    hub_client.hub.faults.append(Fault("/verify", delay=0.5, times=1))
    push = "api.create_commit('me/m', [add('a', b'1'), add('w.bin', b'2')], commit_message='m')"
    process = subprocess.Popen([sys.executable, "-c", HEAD + push], env=hub_client.environment())
    deadline = time.monotonic() + 20
    while not hub_client.hub.requests("", method="PUT") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert set(state.entries("me/m", state.refs("me/m")["main"])) == {".gitattributes"}
    run(hub_client, push)
    assert state.read("me/m", "w.bin") == b"2"
    assert len(hub_client.hub.requests("", method="PUT")) == 1


def test_several_processes_commit_at_once(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    state.create_repo("me/m")
    script = (
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from fake_hub.state import HubState\n"
        f"state = HubState(Path({str(state.root)!r}))\n"
        "for number in range(20): state.commit('me/m', {f'{sys.argv[1]}-{number}': b'1'})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(number)]) for number in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    tip = state.refs("me/m")["main"]
    assert len(state.history("me/m", tip)) == len(state.entries("me/m", tip)) == 60


def test_the_command_line_sees_this_hub_and_this_cache(hub_client: HubClient) -> None:
    done = hub_client.command("--version")
    assert (done.returncode, done.stdout.startswith("aoconvert")) == (0, True)
    process = hub_client.popen("inspect", "me/none", "--json", token="hf_no")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 5
    assert json.loads(output)["error"]["type"] == "HubError"
    assert {entry.token for entry in hub_client.hub.log} >= {"hf_no"}


def test_hubs_share_a_process_and_nothing_else(tmp_path: Path) -> None:
    endpoints = []
    for number in range(2):
        with LoopbackHub(tmp_path / str(number)) as hub:
            endpoints.append(hub.endpoint)
            assert (hub.log, hub.state.options.page_size) == ([], 1000)
            client = HubClient(hub, tmp_path)
            assert raw(client, "GET", "/api/models/a/b", token=None)[0] == 401
            hub.faults.append(Fault("", status=503))
            assert raw(client, "GET", "/api/models/a/b", token=None)[0] == 503
            assert len(hub.log) == 2
    assert len(set(endpoints)) == 2


def test_an_error_of_the_hub_itself_fails_the_test(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="KeyError: 'files'"),
        LoopbackHub(tmp_path) as hub,
    ):
        hub.state.add_user("me", TOKEN)
        hub.state.create_repo("me/m", initial_commit=True)
        assert raw(HubClient(hub, tmp_path), "POST", "/api/models/me/m/preupload/main", b"{}")[0] == 500
