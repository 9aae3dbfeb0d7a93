"""Users, organisations and tokens of the loopback Hub, and what each of them may do.

``accounts.json``: ``{"orgs": {org: {user: role}}, "tokens": {token: {user, role, scopes}}}``. Roles of a token are
those that ``GET /api/whoami-v2`` names: read, write, fineGrained. Roles in an organisation are admin, write,
contributor (may create repos and write its own) and read: https://huggingface.co/docs/hub/organizations-security.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fake_hub.disk import Disk


@dataclass(frozen=True)
class Token:
    """Whose a token is and what it is good for.

    Attributes:
        role: read, write or fineGrained.
        scopes: for fineGrained, permissions such as ``repo.write`` by user, organisation or repo id.
    """

    user: str
    role: str = "write"
    scopes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def permits(self, permission: str, *entities: str) -> bool:
        """Whether the token, not the user, may do this to a repo or its namespace."""
        if self.role == "fineGrained":
            return any(permission in self.scopes.get(entity, ()) for entity in entities)
        return self.role == "write" or permission == "repo.content.read"


class Accounts:
    """Any thread and any process may call."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._file = disk.root / "accounts.json"

    def add_token(self, token: str, owner: Token) -> None:
        with self._disk.lock():
            raw = self._read()
            raw["tokens"][token] = asdict(owner)
            self._disk.write(self._file, raw)

    def remove_token(self, token: str) -> None:
        with self._disk.lock():
            raw = self._read()
            del raw["tokens"][token]
            self._disk.write(self._file, raw)

    def add_org(self, name: str, members: Mapping[str, str]) -> None:
        """An organisation, or new members of it, with their roles."""
        with self._disk.lock():
            raw = self._read()
            raw["orgs"][name] = {**raw["orgs"].get(name, {}), **members}
            self._disk.write(self._file, raw)

    def token(self, token: str) -> Token | None:
        raw = self._read()["tokens"].get(token)
        return None if raw is None else Token(**raw)

    def orgs(self, user: str) -> dict[str, str]:
        """The organisations of a user and the role in each."""
        return {name: members[user] for name, members in self._read()["orgs"].items() if user in members}

    def role(self, user: str, namespace: str) -> str | None:
        """What a user is in a namespace: admin of their own."""
        return "admin" if user == namespace else self.orgs(user).get(namespace)

    def _read(self) -> dict[str, Any]:
        raw: dict[str, Any] = self._disk.read(self._file, {"orgs": {}, "tokens": {}})
        return raw
