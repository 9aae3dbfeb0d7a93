"""What the Hub client raises, in one line each.

huggingface_hub 2.x raises its own errors, raw httpx2 errors (a reset, a refused connection, TLS), ``RuntimeError`` with
the cause chained (an LFS upload), ``builtins.ConnectionError`` with a status in its text (Xet), ``ValueError`` (also
for a card whose metadata the Hub refuses) and ``OSError``; where it looks into its cache after a failure, it hides the
failure behind ``LocalEntryNotFoundError`` or ``RevisionResolutionError``. No message quotes request headers, because
the token is in them.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from aoconvert.errors import AoconvertError, HubError

LOGIN_HINT = "log in with `hf auth login`, or give a token with --token or HF_TOKEN"
RETRY_HINT = "try again; downloaded files are kept in the cache"
AGAIN_HINT = "run the same command again: it does not send again what has arrived"
_SECRET = re.compile(r"hf_\w{4,}|(?<=Bearer )[^\s'\"]+")
_STATUS = re.compile(r"\b(?:status|error|response|code)\b[^0-9]{0,40}\b([45]\d\d)\b", re.IGNORECASE)

Doing = Literal["read", "write"]


@contextmanager
def translate_errors(repo_id: str, revision: str | None, *, doing: Doing = "read") -> Iterator[None]:
    """Turn whatever the Hub client raises into a :class:`HubError`; put nothing but calls to the client inside."""
    try:
        with _silence_client():
            yield
    except AoconvertError:
        raise
    except Exception as error:
        raise hub_error(error, repo_id, revision, doing=doing) from error


@contextmanager
def _silence_client() -> Iterator[None]:
    """Keep what the client logs off stderr: its retries hold signed addresses, and what fails is raised as well.

    A handler that writes to no stream stays, such as one that shows on a progress bar that the client waits.
    """
    import huggingface_hub.utils  # which gives the client's logger a handler

    logger = logging.getLogger(huggingface_hub.__name__)
    before = logger.handlers, logger.propagate
    kept = [handler for handler in logger.handlers if not isinstance(handler, logging.StreamHandler)]
    logger.handlers, logger.propagate = [*kept, logging.NullHandler()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


def hub_error(error: BaseException, repo_id: str, revision: str | None, *, doing: Doing = "read") -> HubError:
    """The error that tells the user what happened.

    Args:
        error: what the Hub client raised.
        repo_id: ``user/repo``, the repo that was asked for.
        revision: branch, tag or commit hash that was asked for; ``None`` for the default branch.
        doing: what it was asked for; whoever writes is told other things to do next.
    """
    from huggingface_hub import errors

    name = repo_id if revision is None else f"{repo_id} (revision {revision[:12]})"
    if doing == "write":
        return _write_error(error, repo_id, name)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError):
        if error.__cause__ is not None and not isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            return hub_error(error.__cause__, repo_id, revision)
        return not_cached(name, "check the spelling, as this folder does not exist; ")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return not_cached(name)
    if isinstance(error, errors.HfHubHTTPError):
        return _http_error(error, repo_id, revision)
    return _network_error(error, name) or _disk_error(error, name) or _other_error(error, name)


def not_cached(what: str, first: str = "") -> HubError:
    """The error for something that is not in the cache while the network may not be used; ``first`` begins the hint."""
    return HubError(
        f"{what} is not in the cache, and the network may not be used",
        hint=f"{first}run once without --local-files-only and HF_HUB_OFFLINE, or point --cache-dir at the right cache",
    )


def check_token(token: str | None) -> None:
    """Refuse a token that cannot be one: sent as it is, the HTTP client would refuse it with a message that quotes it.

    Raises:
        HubError: it holds characters that no token has.
    """
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise HubError("the token has characters that no token can have (a line break or space?)", hint="copy it again")


def without_secrets(text: str) -> str:
    """A text with everything in it that looks like a token blotted out."""
    return _SECRET.sub("***", text)


def failed_status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of the Hub client goes back to, also where it is only told in a text."""
    from huggingface_hub import errors

    for link in _chain(error):
        if isinstance(link, errors.HfHubHTTPError):
            return int(link.response.status_code)
    for link in _chain(error):
        if isinstance(link, ConnectionError | RuntimeError) and (found := _STATUS.search(str(link))):
            return int(found[1])
    return None


def never_answered(error: BaseException | None) -> bool:
    """Whether nobody knows what the Hub did: the connection broke, or the answer was not one of a Hub."""
    import httpx2

    unknown = (httpx2.TransportError, httpx2.DecodingError, json.JSONDecodeError, KeyError, ConnectionError)
    return any(isinstance(link, unknown) for link in _chain(error))


def _write_error(error: BaseException, repo_id: str, name: str) -> HubError:
    """What happened while something was sent to the Hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"{name}: HF_HUB_OFFLINE is set, but this needs the Hub", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return HubError("not logged in to the Hub: there is no token", hint=LOGIN_HINT)
    file = re.match(r"Error while uploading '(.+)' to the Hub", str(error)) if type(error) is RuntimeError else None
    if file is not None:
        name = f"{name}: {_one_line(file[1])}"
    if type(error) is ValueError and str(error).startswith("Invalid metadata in README.md"):
        said = _one_line(" ".join(line.removeprefix("- ") for line in str(error).splitlines()[1:]))
        return HubError(
            f"{repo_id}: the Hub refuses the metadata of README.md: {said}", hint="correct it, and run it again"
        )
    status = failed_status(error)
    if status is not None:
        return _write_refused(error, status, name)
    known = next((link for link in _chain(error) if _network_error(link, name) is not None), error)
    found = _network_error(known, name)
    if found is not None:
        return HubError(found.message, hint=_write_hint(found.hint), retryable=found.retryable)
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(f"{name}: a file cannot be read or written: {error.strerror}", hint="check the folder")
    return _other_error(error, name)


def _write_hint(hint: str | None) -> str:
    """The hint of a reader, for a writer: the cache helps nobody who sends."""
    if hint is None or hint == RETRY_HINT:
        return AGAIN_HINT
    return hint.replace("; --local-files-only uses what is in the cache", f"; then {AGAIN_HINT}")


def _write_refused(error: BaseException, status: int, name: str) -> HubError:
    """The Hub, or the storage behind it, answered a write with a status of 400 or more."""
    from huggingface_hub import errors

    answer = next((link for link in _chain(error) if isinstance(link, errors.HfHubHTTPError)), None)
    said = _one_line(answer.server_message or "") if answer is not None else ""
    because = f": {said}" if said else ""
    storage = answer is None or answer.response.request.method == "PUT"
    if storage and status in (401, 403, 404):
        return HubError(f"{name}: the storage does not accept it ({status}){because}", hint=AGAIN_HINT, retryable=True)
    if status == 401 and not isinstance(answer, errors.RepositoryNotFoundError):
        return HubError(f"{name}: the Hub does not accept the token (401){because}", hint=LOGIN_HINT)
    if isinstance(answer, errors.GatedRepoError | errors.DisabledRepoError) or status == 403:
        return HubError(f"{name}: this token may not write there ({status}){because}", hint=WRITE_HINT)
    if isinstance(answer, errors.RepositoryNotFoundError):
        return HubError(
            f"{name}: the model does not exist, or this token may not see it", hint=f"check the spelling; {LOGIN_HINT}"
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        return HubError(f"{name}: the branch, tag or pull request does not exist", hint="check --revision")
    if status == 409:
        return HubError(
            f"{name}: the Hub reports a conflict (409){because}",
            hint="another repo may have this name, or another user is writing to it: check, then run the command again",
        )
    if status == 412:
        return HubError(f"{name}: another user committed in the meantime (412)", hint=AGAIN_HINT, retryable=True)
    if status == 413:
        return HubError(
            f"{name}: too large for the Hub (413){because}",
            hint="convert again with a smaller --max-shard-size, or check the limits of the account",
        )
    if status == 429:
        wait = retry_after(answer.response.headers) if answer is not None else None
        when = f"in {wait} s" if wait else "later"
        said = f"{name}: too many requests, the Hub asks to wait (429)"
        return HubError(said, hint=f"{when}, {AGAIN_HINT}", retryable=True)
    if status >= 500:
        hint = f"{AGAIN_HINT}; see https://status.huggingface.co"
        return HubError(f"{name}: the Hub failed ({status})", hint=hint, retryable=True)
    return HubError(f"{name}: the Hub answered {status}{because}", hint=AGAIN_HINT)


WRITE_HINT = "give a token with write access to it (https://huggingface.co/settings/tokens), or use --create-pr"


def _http_error(error: BaseException, repo_id: str, revision: str | None) -> HubError:
    """An answer of the Hub with a status of 400 or more."""
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status = error.response.status_code
    page = f"{_endpoint()}/{repo_id}"
    # From the narrow class to the wide one: GatedRepoError is a RepositoryNotFoundError.
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{repo_id} is gated, and this account has no access to it",
            hint=f"ask for access at {page}, then {LOGIN_HINT}",
        )
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{repo_id} has been disabled", hint=f"see {page}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"the Hub has no model {repo_id}, or it is private (and this folder does not exist)",
            hint=f"check the spelling; for a private model {LOGIN_HINT}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{repo_id} has no revision {revision}",
            hint=f"give a branch, a tag or a full commit hash; {page}/commits/main lists them",
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        file = error.response.url.path.partition("/resolve/")[2].partition("/")[2]
        return HubError(f"{repo_id} has no file {file}" if file else f"{repo_id}: the Hub does not find a file")
    if status == 401:
        return HubError(f"{repo_id}: the Hub does not accept the token (401)", hint=LOGIN_HINT)
    if status == 403:
        return HubError(
            f"{repo_id}: the token may not read this (403)", hint="give a token with read access to the repo"
        )
    if status == 429:
        wait = retry_after(error.response.headers)
        when = f"in {wait} s" if wait else "later"
        return HubError(
            f"{repo_id}: too many requests, the Hub asks to wait (429)",
            hint=f"try again {when}; {LOGIN_HINT}",
            retryable=True,
        )
    if status >= 500:
        return HubError(
            f"{repo_id}: the Hub failed ({status})",
            hint="try again later; see https://status.huggingface.co",
            retryable=True,
        )
    said = _one_line(error.server_message or error.response.reason_phrase)
    return HubError(f"{repo_id}: the Hub answered {status} {said}".rstrip())


def _network_error(error: BaseException, name: str) -> HubError | None:
    """The Hub did not answer at all, or not to the end."""
    import httpx2
    from huggingface_hub import errors

    host = _endpoint()
    tls = next((link for link in _chain(error) if isinstance(link, ssl.SSLError)), None)
    if tls is not None:
        reason = getattr(tls, "verify_message", None) or getattr(tls, "reason", None) or "no reason given"
        return HubError(
            f"{name}: no secure connection to {host}: {_one_line(str(reason))}",
            hint="check the clock, the proxy and the certificates (SSL_CERT_FILE)",
        )
    if isinstance(error, httpx2.ProxyError):
        return HubError(f"{name}: the proxy refused the connection to {host}", hint="check HTTPS_PROXY and NO_PROXY")
    if isinstance(error, httpx2.TimeoutException):
        return HubError(f"{name}: {host} did not answer in time", hint=RETRY_HINT, retryable=True)
    if isinstance(error, httpx2.ConnectError):
        return HubError(
            f"{name}: cannot connect to {host}",
            hint="check the network and HF_ENDPOINT; --local-files-only uses what is in the cache",
            retryable=True,
        )
    broken = (httpx2.TransportError, ConnectionError, errors.XetDownloadError)
    if isinstance(error, broken) or "Consistency check failed" in str(error):
        return HubError(f"{name}: the connection to {host} broke", hint=RETRY_HINT, retryable=True)
    if isinstance(error, errors.FileMetadataError):
        return HubError(f"{name}: {host} does not answer like a Hub", hint="check HF_ENDPOINT and the proxy")
    return None


def _disk_error(error: BaseException, name: str) -> HubError | None:
    """The cache cannot be written."""
    for link in _chain(error):
        full = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(link):
            return HubError(f"{name}: the disk of the cache is full", hint=SPACE_HINT)
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(
            f"{name}: the cache cannot be written: {error.strerror}",
            hint="check --cache-dir, HF_HOME and its permissions",
        )
    return None


SPACE_HINT = "free some space (`hf cache prune`), or give another cache with --cache-dir or HF_HOME"


def _other_error(error: BaseException, name: str) -> HubError:
    detail = _one_line(str(error))
    return HubError(
        f"{name}: the Hub client failed ({type(error).__name__}{': ' if detail else ''}{detail})",
        hint="check HF_ENDPOINT; AOCONVERT_DEBUG=1 shows the traceback",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, at most ten deep (a chain can be cyclic)."""
    link = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def retry_after(headers: object) -> int | None:
    """Seconds to wait, from ``Retry-After`` or the ``RateLimit`` header (IETF httpapi-ratelimit-headers draft)."""
    get = getattr(headers, "get", dict[str, str]().get)
    value = str(get("retry-after") or "").strip()
    if value.isdigit():
        return int(value)
    match = re.search(r"\bt=(\d+)", str(get("ratelimit") or ""))
    return int(match[1]) if match else None


def _endpoint() -> str:
    from huggingface_hub import constants

    # A mirror's address may hold a password.
    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def _one_line(text: str) -> str:
    """The first line of a text from outside, secrets blotted out, at most 200 characters."""
    lines = text.strip().splitlines()
    return _SECRET.sub("***", lines[0])[:200] if lines else ""
