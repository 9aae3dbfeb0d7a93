"""A checkpoint on the Hub: opened as its card's reader opens it, with a cache that holds nothing."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aoconvert.errors import VerificationError
from aoconvert.humanize import size

# what says where a cache is, or that the Hub is not to be asked: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
_CACHES = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH"),
    *("HF_MODULES_CACHE", "TRANSFORMERS_CACHE", "DIFFUSERS_CACHE", "HF_STORED_TOKENS_PATH"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"),
)

_PREFIX, _LOCK = ".aoconvert-empty-", ".lock"


@contextlib.contextmanager
def _new_folder(home: Path) -> Iterator[Path]:
    """A folder in ``home``, or where that cannot be with other temporary ones; what a killed run left there goes first.

    Whoever uses one holds a lock in it.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        for left in home.glob(f"{_PREFIX}*"):
            if _is_left(left):
                shutil.rmtree(left, ignore_errors=True)
        root = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=home, ignore_cleanup_errors=True)
    except OSError:
        root = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    with root as name, (Path(name) / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


def _is_left(folder: Path) -> bool:
    """Whether nobody uses such a folder any more."""
    if folder.is_symlink():
        return False
    try:
        with (folder / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use, just being made, or no such folder
        return False
    return True


@dataclass(frozen=True)
class Published:
    """A commit on the Hub whose files were fetched, so that they are checked before anything of it is opened.

    Attributes:
        repo_id: ``user/repo``.
        commit: its hash.
        revision: the branch, tag or commit that was asked for; ``None`` for the default branch.
        size: bytes of all its files.
        token: ``None`` uses the token that the Hub client finds. It is in no repr.
    """

    repo_id: str
    commit: str
    revision: str | None
    size: int
    token: str | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, str]:
        """As the report names it."""
        return {"repo_id": self.repo_id, "revision": self.revision or "main", "commit": self.commit}

    @property
    def shown(self) -> str:
        """For one line."""
        return f"{self.repo_id}, {self.revision or 'main'} at {self.commit[:12]}"

    @contextlib.contextmanager
    def empty_cache(self, beside: Path | None = None) -> Iterator[Path]:
        """A new ``HF_HOME``, removed at the end.

        Args:
            beside: folder to make it in; by default the user's own ``HF_HOME``, on whose disk there is most room.

        Raises:
            VerificationError: there is no room for the files.
        """
        from huggingface_hub import constants

        with _new_folder(beside or Path(constants.HF_HOME)) as folder:
            free = shutil.disk_usage(folder).free
            if free < self.size:
                raise VerificationError(
                    f"the files need {size(self.size)} in an empty cache, and {folder.parent} has {size(free)} free",
                    hint="free space, or set HF_HOME to a folder on another disk",
                )
            yield folder

    def environment(self, environment: Mapping[str, str], home: Path) -> dict[str, str]:
        """What the process of a user with an empty cache would see: the same endpoint, proxies and account.

        transformers asks a bot to convert a repo's ``.bin`` files where it meets them, unless it is told not to: a
        verification changes nothing on the Hub.
        """
        from huggingface_hub import get_token

        ours = {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"}
        token = self.token or get_token()
        if token is not None:
            ours["HF_TOKEN"] = token
        return {**{name: value for name, value in environment.items() if name not in _CACHES}, **ours}

    def other_files(self, home: Path) -> list[str]:
        """What was fetched besides this commit, as ``user/repo at commit``."""
        mine = "models--" + self.repo_id.replace("/", "--")
        found = []
        for snapshot in sorted((home / "hub").glob("*/snapshots/*")):
            repo = snapshot.parents[1].name
            if (repo, snapshot.name) != (mine, self.commit):
                found.append(f"{repo.partition('--')[2].replace('--', '/')} at {snapshot.name[:12]}")
        return found
