"""A source that is a model repo on the Hugging Face Hub, pinned to one commit."""

from __future__ import annotations

import glob
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from aoconvert.errors import DAMAGED_HINT, HubError, SourceError
from aoconvert.options import HubOptions
from aoconvert.sources.base import FetchProgress, Source, SourceFile, is_safe_path
from aoconvert.sources.byte_source import ByteSource
from aoconvert.sources.folder import list_folder
from aoconvert.sources.hub_errors import SPACE_HINT, check_token, not_cached, translate_errors
from aoconvert.sources.remote import RangedFile

# Fetched when the source is opened: configs, indexes, tokenizers and what the model card needs, never weights.
SMALL_SUFFIXES = frozenset({".json", ".txt", ".md", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".yaml", ".yml"})
SMALL_NAMES = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)\b.*", re.IGNORECASE)
# Tokenizers reach 35 MB; what is larger is no config, whatever its name says.
SMALL_BYTES = 64_000_000


class HubSource(Source):
    """A model repo at one commit. Use :func:`open_hub`.

    The token lives in this object and nowhere else: it is in no repr and no message.
    """

    kind: Literal["hub", "folder", "file"] = "hub"
    repo_id: str
    revision: str

    def __init__(
        self,
        repo_id: str,
        revision: str,
        files: Mapping[str, SourceFile],
        *,
        snapshot: Path,
        hub: HubOptions,
        offline: bool,
    ) -> None:
        self.repo_id = self.label = repo_id
        self.revision = revision
        self._files = files
        self.root = snapshot
        self._hub = hub
        self._offline = offline

    def __repr__(self) -> str:
        return f"HubSource({self.repo_id!r}, revision={self.revision!r})"

    def files(self) -> Mapping[str, SourceFile]:
        """Every file of the repo at this commit; offline, those the cache knows of."""
        return self._files

    def local(self, path: str) -> Path:
        """The file in the cache's snapshot folder; see :meth:`Source.local`."""
        self.require(path)
        file = self.root / path
        if not file.is_file():
            raise SourceError(f"{self.label}: {path} has not been fetched")
        return file

    def fetch(self, paths: Sequence[str], progress: FetchProgress | None = None) -> None:
        """Download what is not in the cache yet, at the pinned commit; see :meth:`Source.fetch`."""
        entries = [self.require(path) for path in dict.fromkeys(paths)]
        missing = [entry for entry in entries if not (self.root / entry.path).is_file()]
        if not missing:
            return
        if self._offline:
            raise not_cached(_list_files(self.repo_id, missing))
        total = sum(entry.size for entry in missing)
        _check_space(self.root, total, self.label)
        download(
            self.repo_id,
            self.revision,
            [entry.path for entry in missing],
            self._hub,
            report=None if progress is None else lambda done: progress(min(done, total), total),
        )
        # Where the Hub fails, the client may return an incomplete snapshot without a word.
        missing = [entry for entry in missing if not (self.root / entry.path).is_file()]
        if missing:
            raise HubError(
                f"not downloaded from {_list_files(self.repo_id, missing)}", hint="try again", retryable=True
            )
        if progress is not None:
            progress(total, total)

    def open(self, path: str) -> AbstractContextManager[ByteSource]:
        """As :meth:`Source.open`; a file that was not fetched is read from the Hub by ranged requests."""
        if self.is_local(path):
            return super().open(path)
        return nullcontext(self._ranged(path))

    def _ranged(self, path: str) -> RangedFile:
        entry = self.require(path)
        if self._offline:
            raise not_cached(_list_files(self.repo_id, [entry]))
        return RangedFile(self.repo_id, self.revision, path, entry.size, self._hub.token)

    def read_range(self, path: str, offset: int, count: int) -> bytes:
        """As :meth:`Source.read_range`; from the Hub, by one request for just these bytes.

        Raises:
            SourceError: the file is shorter than that.
            HubError: the Hub refused, broke off, or does not answer ranged requests; it is not in the cache.
        """
        entry = self.require(path)
        if (self.root / path).is_file():
            return super().read_range(path, offset, count)
        file = self._ranged(path)
        if offset + count > entry.size:
            raise SourceError(f"{self.label}: {path} is truncated", hint=DAMAGED_HINT)
        if not count:
            return b""
        return file.read_range(offset, offset + count)


def open_hub(repo_id: str, hub: HubOptions, *, trust_remote_code: bool, small_files: bool = True) -> HubSource:
    """Pin a repo to a commit and fetch its small files; weights stay on the Hub until :meth:`HubSource.fetch`.

    Args:
        repo_id: ``user/repo``.
        hub: without a token, the Hub client finds one (``HF_TOKEN``, ``hf auth login``); as ``local_files_only`` does
            ``HF_HUB_OFFLINE=1``.
        trust_remote_code: also fetch the repo's ``.py`` files.
        small_files: fetch configs, tokenizers and the like; without it nothing is fetched yet.

    Raises:
        HubError: no such repo or revision, no access, no connection, not in the cache.
    """
    from huggingface_hub import is_offline_mode

    check_token(hub.token)
    if hub.local_files_only or is_offline_mode():
        return _open_cached(repo_id, hub)
    commit, files = _pin(repo_id, hub)
    snapshot = _snapshot_folder(repo_id, commit, hub.cache_dir)
    small = [entry.path for entry in files.values() if small_files and _is_small(entry, trust_remote_code)]
    if small:
        snapshot = download(repo_id, commit, small, hub, report=None)
    return HubSource(repo_id, commit, files, snapshot=snapshot, hub=hub, offline=False)


def _pin(repo_id: str, hub: HubOptions) -> tuple[str, dict[str, SourceFile]]:
    """The commit hash a revision means now, and every file of that commit."""
    from huggingface_hub import HfApi

    with translate_errors(repo_id, hub.revision):
        api = HfApi(token=hub.token)
        # resolve_revision also notes in the cache what the branch means, for a later run without the network.
        commit = api.resolve_revision(repo_id, revision=hub.revision, cache_dir=hub.cache_dir).resolved
        siblings = api.model_info(repo_id, revision=commit, files_metadata=True).siblings or []
    files = {}
    for sibling in sorted(siblings, key=lambda sibling: sibling.rfilename):
        if is_safe_path(sibling.rfilename):
            sha256 = None if sibling.lfs is None else sibling.lfs.sha256
            files[sibling.rfilename] = SourceFile(sibling.rfilename, sibling.size or 0, sha256)
    return commit, files


def _snapshot_folder(repo_id: str, commit: str, cache_dir: Path | None) -> Path:
    """Where the cache keeps a commit; the folder need not be there yet."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(cache_dir or constants.HF_HUB_CACHE) / folder / "snapshots" / commit


def _open_cached(repo_id: str, hub: HubOptions) -> HubSource:
    """The source as the cache knows it: the files that are there, and the commit's listing where it was kept."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    cache_dir = hub.cache_dir
    with translate_errors(repo_id, hub.revision):
        # No pattern, so an incomplete snapshot is good enough: ours hold the small files only, at first.
        snapshot = Path(
            snapshot_download(
                repo_id, revision=hub.revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=[]
            )
        )
        commit = snapshot.name
        try:
            tree = get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)
        except CachedRepoTreeNotFoundError:
            tree = []
    files = {entry.path: SourceFile(entry.path, entry.size) for entry in tree if is_safe_path(entry.path)}
    for path, entry in list_folder(snapshot, repo_id).items():
        files[path] = SourceFile(path, entry.size, _cached_sha256(snapshot / path))
    return HubSource(
        repo_id,
        commit,
        dict(sorted(files.items())),
        snapshot=snapshot,
        hub=hub,
        offline=True,
    )


def download(
    repo_id: str,
    commit: str,
    paths: Sequence[str],
    hub: HubOptions,
    *,
    report: Callable[[int], None] | None,
) -> Path:
    """Fetch files of one commit into the cache, and nothing else.

    Args:
        paths: exact paths; characters that are special in patterns are escaped.
        report: called with the bytes done so far.

    Returns:
        The cache's snapshot folder of the commit.

    Raises:
        HubError: the Hub refused, the connection broke, or the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    with translate_errors(repo_id, commit):
        return Path(
            snapshot_download(
                repo_id,
                revision=commit,
                cache_dir=hub.cache_dir,
                token=hub.token,
                allow_patterns=[glob.escape(path) for path in paths],
                tqdm_class=_bar_class(report),
            )
        )


def _bar_class(report: Callable[[int], None] | None) -> type[Any]:
    """A progress bar class for the Hub client that shows nothing and reports bytes instead.

    The client has two byte bars for the same files, received and written: the one that is ahead counts.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # public, but not in __all__

    lock = threading.Lock()
    best = 0

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if report is None or not self._counts_bytes:
                return
            nonlocal best
            with lock:
                self.n += n or 0
                if self.n > best:
                    best = int(self.n)
                    report(best)

    return ReportingBar


def _is_small(entry: SourceFile, trust_remote_code: bool) -> bool:
    """Whether a file is fetched when the source is opened."""
    path = PurePosixPath(entry.path)
    if entry.size > SMALL_BYTES or any(part.startswith(".") for part in path.parts):
        return False
    if path.suffix == ".py":
        return trust_remote_code
    return path.suffix in SMALL_SUFFIXES or SMALL_NAMES.fullmatch(path.name) is not None


def _cached_sha256(file: Path) -> str | None:
    """The sha256 the Hub gave for a cached LFS file: the name of the blob its link points to."""
    if not file.is_symlink():
        return None
    blob = file.readlink().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None


def _check_space(folder: Path, needed: int, label: str) -> None:
    """Refuse a download that cannot fit, rather than fail when the disk is full."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{label}: the files to download take {needed / 1e9:.1f} GB, the cache's disk has {free / 1e9:.1f} GB free",
            hint=SPACE_HINT,
        )


def _list_files(repo_id: str, entries: Sequence[SourceFile]) -> str:
    """Files for a message: the first three by name, the rest by number."""
    names = ", ".join(entry.path for entry in entries[:3])
    rest = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    return f"{repo_id}: {names}{rest}"
