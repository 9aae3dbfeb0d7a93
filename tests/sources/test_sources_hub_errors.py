"""Every way the Hub can fail, provoked on the loopback Hub and seen through the released client."""

import errno
import json
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault

from aoconvert.errors import HubError
from aoconvert.sources.hub import _check_space
from aoconvert.sources.hub_errors import hub_error

API = "^/api/models/user/model$"


def header_only(size: int) -> bytes:
    raw = json.dumps({"w": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


@pytest.fixture
def client(hub_client: HubClient) -> HubClient:
    hub_client.hub.state.create_repo("user/model")
    hub_client.hub.state.commit("user/model", {"config.json": b"{}", "model.safetensors": header_only(300_000)})
    return hub_client


def check(outcome: dict[str, Any], message: str, hint: str) -> None:
    assert outcome.get("error") == "HubError", outcome
    assert outcome["exit_code"] == 5
    assert message in outcome["message"], outcome["message"]
    assert "\n" not in outcome["message"]
    assert hint in (outcome["hint"] or ""), outcome["hint"]


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (Fault(API, status=401), "user/model: the Hub does not accept the token (401)", "hf auth login"),
        (Fault(API, status=403), "user/model: the token may not read this (403)", "read access"),
        (
            Fault(API, status=403, headers={"X-Error-Message": "Access to this resource is disabled."}),
            "user/model has been disabled",
            "/user/model",
        ),
        (Fault(API, status=429, headers={"Retry-After": "7"}), "asks to wait (429)", "try again in 7 s"),
        (Fault(API, status=429, headers={"RateLimit": '"api";r=0;t=55'}), "asks to wait (429)", "try again in 55 s"),
        (Fault(API, status=429), "asks to wait (429)", "try again later"),
        (Fault(API, status=500), "user/model: the Hub failed (500)", "status.huggingface.co"),
        (Fault(API, status=503, body=b"<html>"), "user/model: the Hub failed (503)", "try again later"),
        (Fault(API, status=418, body=b'{"error": "tea\\nonly"}'), "user/model: the Hub answered 418 tea", ""),
        (Fault(API, reset=True), "the connection to http://127.0.0.1:", "try again"),
        (Fault("^/api/models/user/model", cut_after=20), "the connection to http://127.0.0.1:", "try again"),
        (Fault(API, status=200, body=b"<html>login</html>"), "the Hub client failed (JSONDecodeError", "HF_ENDPOINT"),
        (Fault(API, status=200, body=b"{}"), "the Hub client failed (", "HF_ENDPOINT"),
    ],
    ids=lambda value: str(value.status or "reset or cut") if isinstance(value, Fault) else "",
)
def test_opening(client: HubClient, fault: Fault, message: str, hint: str) -> None:
    client.hub.faults.append(fault)
    check(client.run("result = attempt(lambda: resolve('user/model'))"), message, hint)


def test_what_the_hub_refuses(client: HubClient) -> None:
    state = client.hub.state
    state.create_repo("user/private", private=True)
    state.commit("user/private", {"config.json": b"{}"})
    state.create_repo("user/gated", gated=True)
    state.commit("user/gated", {"config.json": b"{}", "model.safetensors": header_only(10)})
    state.add_user("stranger", "hf_stranger")
    missing, private, revision, gated, gated_stranger, entry = client.run(
        "names = ['user/missing', 'user/private', 'user/model@nope', 'user/gated']\n"
        "result = [attempt(lambda: resolve(n)) for n in names]\n"
        "result.append(attempt(lambda: resolve('user/gated', HubOptions(token='hf_stranger'))))\n"
        "from aoconvert.sources.base import SourceFile\n"
        "s = resolve('user/model')\n"
        "s._files = {**s.files(), 'gone.safetensors': SourceFile('gone.safetensors', 10)}\n"
        "result.append(attempt(lambda: entries(s, 'gone.safetensors')))"
    )
    check(missing, "the Hub has no model user/missing, or it is private", "check the spelling")
    check(private, "the Hub has no model user/private, or it is private", "hf auth login")
    check(revision, "user/model has no revision nope", "/user/model/commits/main")
    for outcome in (gated, gated_stranger):
        check(outcome, "user/gated is gated, and this account has no access to it", "/user/gated")
    check(entry, "user/model has no file gone.safetensors", "")


FETCH = "s = resolve('user/model'); result = attempt(lambda: s.fetch(['model.safetensors']))"


def test_fetch_recovers_from_a_cut_connection(client: HubClient) -> None:
    """The client reads 10 MiB at a time, and resumes after the last whole one."""
    client.hub.state.commit("user/model", {"model.safetensors": header_only(12 << 20)})
    client.hub.faults.append(Fault("^/lfs/", method="GET", cut_after=11 << 20, times=1))
    assert client.run(FETCH) == {"value": None}
    assert [entry.range for entry in client.hub.requests("^/lfs/")] == [None, f"bytes={10 << 20}-"]
    assert "signature" not in client.stderr, "the client logs the address that it resumes, and that is signed"


def test_reset_during_a_fetch(client: HubClient) -> None:
    """The client resumes after a short body, but not after a reset."""
    client.hub.faults.append(Fault("^/lfs/", method="GET", cut_after=100_000, reset=True, times=1))
    check(client.run(FETCH), "the connection to http://127.0.0.1:", "try again")
    assert client.run(FETCH) == {"value": None}


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (Fault("^/lfs/", status=403), "the token may not read this (403)", "read access"),
        (Fault("^/lfs/", status=500), "user/model: the Hub failed (500)", "try again later"),
        (Fault("/resolve/.*safetensors", status=200, method="HEAD"), "does not answer like a Hub", "HF_ENDPOINT"),
        (
            Fault("/resolve/.*safetensors", status=403, headers={"X-Error-Code": "GatedRepo"}),
            "user/model is gated",
            "ask for access",
        ),
        (
            Fault("/resolve/.*safetensors", status=404, headers={"X-Error-Code": "EntryNotFound"}),
            "user/model has no file model.safetensors",
            "",
        ),
    ],
)
def test_fetching(client: HubClient, fault: Fault, message: str, hint: str) -> None:
    client.hub.faults.append(fault)
    check(client.run(FETCH), message, hint)


def test_snapshot_left_incomplete_in_silence(client: HubClient) -> None:
    """Without its listing, the client returns a snapshot that lacks the file as though all were well."""
    script = (
        "import shutil, pathlib\n"
        "s = resolve('user/model')\n"
        "from huggingface_hub import _tree_cache\n"
        "_tree_cache._IN_MEMORY_TREE_CACHE.clear()\n"
        f"shutil.rmtree({str(client.home / 'hub' / 'models--user--model' / 'trees')!r})\n"
        "result = attempt(lambda: s.fetch(['model.safetensors']))"
    )
    # The first open needs the listing; only the second request for it fails.
    client.hub.faults.append(Fault("/tree/", status=400, skip=1, times=1))
    outcome = client.run(script)
    assert len(client.hub.requests("/tree/")) == 2
    check(outcome, "not downloaded from user/model: model.safetensors", "try again")


def test_nobody_listens(client: HubClient) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    outcome = client.run(
        "result = attempt(lambda: resolve('user/model'))", env={"HF_ENDPOINT": f"http://me:pass@127.0.0.1:{port}"}
    )
    check(outcome, f"user/model: cannot connect to http://127.0.0.1:{port}", "--local-files-only")
    assert "me:pass" not in outcome["message"] + outcome["hint"]


def test_unknown_host(client: HubClient) -> None:
    env = {"HF_ENDPOINT": "http://no-such-host.invalid"}
    outcome = client.run("result = attempt(lambda: resolve('user/model'))", env=env)
    check(outcome, "user/model: cannot connect to http://no-such-host.invalid", "HF_ENDPOINT")


def test_proxy_refuses(client: HubClient) -> None:
    """An https endpoint goes through the proxy by CONNECT, which the loopback server does not know."""
    env = {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": client.hub.endpoint, "https_proxy": client.hub.endpoint}
    outcome = client.run("result = attempt(lambda: resolve('user/model'))", env=env)
    check(outcome, "user/model: the proxy refused the connection to https://hub.invalid", "HTTPS_PROXY")


def test_plain_http_behind_https(client: HubClient) -> None:
    env = {"HF_ENDPOINT": client.hub.endpoint.replace("http://", "https://")}
    outcome = client.run("result = attempt(lambda: resolve('user/model'))", env=env)
    check(outcome, "no secure connection to https://127.0.0.1:", "SSL_CERT_FILE")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_certificate_of_nobody(client: HubClient, tmp_path: Path) -> None:
    make = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 1 -subj /CN=127.0.0.1"
    subprocess.run(make, shell=True, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def shake_hands() -> None:
            try:
                connection, _ = listener.accept()
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                pass

        threading.Thread(target=shake_hands, daemon=True).start()
        env = {"HF_ENDPOINT": f"https://127.0.0.1:{listener.getsockname()[1]}"}
        outcome = client.run("result = attempt(lambda: resolve('user/model'))", env=env)
    check(outcome, "self-signed certificate", "SSL_CERT_FILE")


def test_full_disk(client: HubClient, tmp_path: Path) -> None:
    """A cache on a real file system of 1 MB, mounted in a namespace of the client process alone."""
    small = tmp_path / "small"
    small.mkdir()
    prefix = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=1m t {small} && exec "$@"',
        "sh",
    ]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs in a namespace")
    client.hub.state.create_repo("user/big")
    client.hub.state.commit(
        "user/big", {"tokenizer.json": b"x" * 3_000_000, "model.safetensors": header_only(3_000_000)}
    )
    client.hub.state.commit("user/model", {"model.safetensors": header_only(3_000_000)})
    full, foreseen = client.run(
        "from pathlib import Path\n"
        f"cache = Path({str(small)!r})\n"
        "result = [attempt(lambda: resolve('user/big', HubOptions(cache_dir=cache)))]\n"
        "s = resolve('user/model', HubOptions(cache_dir=cache))\n"
        "result.append(attempt(lambda: s.fetch(['model.safetensors'])))",
        prefix=prefix,
    )
    check(full, "the disk of the cache is full", "--cache-dir")
    check(foreseen, "user/model: the files to download take 0.0 GB, the cache's disk has 0.0 GB free", "--cache-dir")
    assert not client.hub.requests("^/lfs/")


def test_too_little_space_is_seen_before_the_download(tmp_path: Path) -> None:
    _check_space(tmp_path / "not" / "yet", 1, "user/model")
    with pytest.raises(HubError, match=r"user/model: the files to download take 1000000000.0 GB"):
        _check_space(tmp_path / "not" / "yet", 10**18, "user/model")


def test_cache_that_cannot_be_a_folder(client: HubClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = client.run(
        "from pathlib import Path\n"
        f"result = attempt(lambda: resolve('user/model', HubOptions(cache_dir=Path({str(tmp_path / 'file')!r}))))"
    )
    check(outcome, "the cache cannot be written", "--cache-dir")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk of the cache is full"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "the disk of the cache is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "the cache cannot be written: Permission denied"),
        (ConnectionError("Xet: 401"), "the connection to"),
        (ValueError("Illegal header value b'Bearer hf_sEcReT123'\nmore"), "failed (ValueError: Illegal header value"),
        (RuntimeError(), "the Hub client failed (RuntimeError)"),
    ],
)
def test_what_xet_and_the_system_raise(error: Exception, message: str) -> None:
    """Errors that loopback HTTP cannot provoke, as the client raises them."""
    found = hub_error(error, "user/model", "0123456789abcdef" + "0" * 24)
    assert message in found.message
    assert found.message.startswith("user/model (revision 0123456789ab)")
    assert "sEcReT" not in found.message
    assert "\n" not in found.message
