"""Who may do what on the loopback Hub, and the errors that say no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fake_hub.accounts import Token
from fake_hub.state import Entry, HubState, Settings
from fake_hub.wire import Exchange, Failure

KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass(frozen=True)
class Repo:
    """A repo that the caller may read.

    Attributes:
        key: its name in ``HubState``: ``user/name``, ``datasets/user/name``.
        caller: the caller's token; ``None`` for a stranger.
        writable: whether the caller may change it.
    """

    state: HubState
    key: str
    settings: Settings
    caller: Token | None
    writable: bool

    @property
    def id(self) -> str:
        return "/".join(self.key.split("/")[-2:])

    @property
    def kind(self) -> str:
        """model, dataset or space."""
        return self.key.split("/")[0].removesuffix("s") if self.key.count("/") == 2 else "model"

    def commit(self, revision: str) -> str:
        """The sha that a revision means. Raises Failure where there is none."""
        sha = self.state.resolve(self.key, revision)
        if sha is None:
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def entries(self, revision: str) -> Mapping[str, Entry]:
        """The files of a revision; none where nothing was committed yet. Raises Failure."""
        if revision == "main" and not self.state.all_refs(self.key):
            return {}
        return self.state.entries(self.key, self.commit(revision))


def repo_key(kind: str, user: str, name: str) -> str:
    if kind not in KINDS:
        raise Failure(404, None, f"no such kind of repo: {kind}")
    return f"{KINDS[kind]}{user}/{name}"


def caller(exchange: Exchange) -> Token | None:
    """The token that came; ``None`` without one. Raises Failure for one that is not known."""
    if exchange.token is None:
        return None
    found = exchange.site.state.accounts.token(exchange.token)
    if found is None:
        raise Failure(401, None, "Invalid credentials in Authorization header")
    return found


def writer(exchange: Exchange) -> Token:
    """A token that may write somewhere. Raises Failure."""
    found = caller(exchange)
    if found is None:
        raise Failure(401, None, "Invalid username or password.")
    if found.role == "read":
        raise Failure(403, None, "You have read access but not the required permissions for this operation")
    return found


def may_create(state: HubState, token: Token, namespace: str) -> bool:
    role = state.accounts.role(token.user, namespace)
    return role in ("admin", "write", "contributor") and token.permits("repo.write", namespace)


def open_repo(exchange: Exchange, key: str, *, content: bool = False) -> Repo:
    """A repo to read; with ``content``, its files too. Raises Failure."""
    state = exchange.site.state
    token = caller(exchange)
    settings = state.settings(key)
    namespace, repo_id = key.split("/")[-2], "/".join(key.split("/")[-2:])
    role = state.accounts.role(token.user, namespace) if token is not None else None
    allowed = settings is not None and (
        not (settings.private or settings.gated)
        or (
            token is not None
            and (role is not None or token.user in settings.readers)
            and token.permits("repo.content.read", namespace, repo_id)
        )
    )
    if settings is None or (settings.private and not allowed):
        # The real Hub does not tell a stranger whether a private repo exists.
        raise Failure(401 if token is None else 404, "RepoNotFound", "Repository not found")
    if content and not allowed:
        message = f"Access to model {repo_id} is restricted"
        raise Failure(401 if token is None else 403, "GatedRepo", message)
    own = role in ("admin", "write") or (token is not None and role == "contributor" and settings.author == token.user)
    writable = own and token is not None and token.permits("repo.write", namespace, repo_id)
    return Repo(state, key, settings, token, writable)


def open_to_write(exchange: Exchange, key: str) -> Repo:
    """A repo to change. Raises Failure."""
    repo = open_repo(exchange, key)
    token = writer(exchange)
    if not repo.writable:
        role = f"{token.role} token of {token.user}"
        raise Failure(403, None, f"You don't have the rights to write to {repo.id} with this {role}")
    return repo


def open_to_propose(exchange: Exchange, key: str) -> Repo:
    """A repo to open a pull request on: whoever may read it and has a token that writes. Raises Failure."""
    repo = open_repo(exchange, key, content=True)
    writer(exchange)
    return repo
