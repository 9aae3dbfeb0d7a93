"""Errors of the Hub client while writing, in one line each: those that a loopback server cannot provoke."""

from __future__ import annotations

import json
import ssl

import httpx2
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status

from aoconvert.sources.hub_errors import failed_status, hub_error, never_answered


def answered(status: int, *, method: str = "POST", **headers: str) -> errors.HfHubHTTPError:
    """The error that the client makes of an answer."""
    request = httpx2.Request(method, "http://127.0.0.1:1/api/models/me/x/commit/main")
    with pytest.raises(errors.HfHubHTTPError) as found:
        hf_raise_for_status(httpx2.Response(status, headers=headers, request=request))
    return found.value


def uploading(cause: BaseException) -> RuntimeError:
    """What the client makes of a failed LFS upload."""
    try:
        raise RuntimeError("Error while uploading 'a/b.bin' to the Hub.") from cause
    except RuntimeError as error:
        return error


def yaml_refused() -> ValueError:
    return ValueError('Invalid metadata in README.md.\n- "license" must be one of [mit]\n- another')


CASES = [
    (answered(401), "does not accept the token (401)", "hf auth login"),
    (answered(403, **{"X-Error-Message": "no rights"}), "may not write there (403): no rights", "--create-pr"),
    (answered(403, **{"X-Error-Code": "GatedRepo"}), "may not write there (403)", "write access"),
    (answered(404, **{"X-Error-Code": "RepoNotFound"}), "the model does not exist", "check the spelling"),
    (
        answered(404, **{"X-Error-Code": "RevisionNotFound"}),
        "the branch, tag or pull request does not exist",
        "--revision",
    ),
    (answered(409), "a conflict (409)", "another repo may have this name"),
    (answered(412), "another user committed in the meantime (412)", "run the same command again"),
    (answered(413), "too large for the Hub (413)", "--max-shard-size"),
    (answered(418), "the Hub answered 418", "run the same command again"),
    (answered(429, **{"Retry-After": "7"}), "asks to wait (429)", "in 7 s, run the same command again"),
    (answered(429), "asks to wait (429)", "later, run the same command again"),
    (answered(503), "the Hub failed (503)", "run the same command again"),
    (uploading(answered(403, method="PUT")), "me/x: a/b.bin: the storage does not accept it (403)", "run the same"),
    (uploading(answered(503, method="PUT")), "me/x: a/b.bin: the Hub failed (503)", "run the same"),
    (uploading(httpx2.WriteError("broken")), "me/x: a/b.bin: the connection to ", "run the same"),
    (
        ConnectionError("Network error: HTTP status client error (401 Unauthorized)"),
        "not accept it (401)",
        "run the same",
    ),
    (ConnectionError("HTTP status client error (413 Request Entity Too Large)"), "(413)", "--max-shard-size"),
    (ConnectionError("HTTP status server error (500 Internal Server Error)"), "failed (500)", "run the same"),
    (ConnectionError("dns error"), "the connection to ", "run the same command again"),
    (httpx2.ConnectError("refused"), "cannot connect to ", "run the same command again"),
    (httpx2.ReadTimeout("slow"), "did not answer in time", "run the same command again"),
    (httpx2.ProxyError("no"), "the proxy refused", "HTTPS_PROXY"),
    (ssl.SSLCertVerificationError("certificate verify failed"), "no secure connection", "SSL_CERT_FILE"),
    (errors.LocalTokenNotFoundError("none"), "not logged in", "hf auth login"),
    (errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set", "unset"),
    (yaml_refused(), 'the Hub refuses the metadata of README.md: "license" must be one of [mit] another', "correct"),
    (PermissionError(13, "Permission denied"), "cannot be read or written: Permission denied", "check the folder"),
    (ValueError("Bearer hf_sEcReT123\nmore"), "failed (ValueError: Bearer ***", "AOCONVERT_DEBUG"),
]


@pytest.mark.parametrize(("error", "message", "hint"), CASES, ids=[case[1][:40] for case in CASES])
def test_what_is_said(error: Exception, message: str, hint: str) -> None:
    found = hub_error(error, "me/x", None, doing="write")
    assert found.exit_code == 5
    assert message in found.message
    assert hint in (found.hint or "")
    assert "\n" not in found.message + (found.hint or "")
    assert "sEcReT" not in found.message
    assert "cache" not in (found.hint or "")


def test_what_became_of_it_is_known_or_not() -> None:
    assert [failed_status(error) for error, *_ in CASES[:3]] == [401, 403, 403]
    assert failed_status(uploading(answered(503, method="PUT"))) == 503
    assert failed_status(ConnectionError("HTTP status client error (404 Not Found)")) == 404
    assert failed_status(ConnectionError("port 5003 of 127.0.0.1")) is None
    assert failed_status(None) is None
    broken = [httpx2.ReadError("x"), httpx2.ReadTimeout("x"), json.JSONDecodeError("x", "", 0), KeyError("commitOid")]
    assert all(never_answered(error) for error in broken)
    assert not never_answered(yaml_refused())
    assert not never_answered(answered(500))
