"""What of a branch aoconvert itself put there. The rest is somebody's, and is not deleted or overwritten unasked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert import cards
from aoconvert.cards import CARD_NAME
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import MANIFEST_NAME, OWN_NAMES, FileEntry, Manifest
from aoconvert.errors import AoconvertError
from aoconvert.hub.identity import other_config, other_model, other_schemes
from aoconvert.hub.types import RemoteFile, UploadFile
from aoconvert.sources.hub_errors import translate_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SMALL = 64_000_000  # bytes; a manifest has some hundred kilobytes
_CONFIGS = ("model_index.json", "config.json")  # at the root; the first that is there says what a repo holds


@dataclass(frozen=True)
class BranchFile:
    """What a branch holds.

    Attributes:
        ours: paths that an earlier push wrote, and that nobody has changed there since.
        model: what it holds, where that is another model; ``None`` where it is the same, or none.
        notes: what changes and is no reason to refuse, one line each.
    """

    ours: frozenset[str] = frozenset()
    model: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Branch:
    """The files of a commit, and how to read one.

    Attributes:
        files: by path.
    """

    api: HfApi
    repo_id: str
    commit: str
    files: Mapping[str, RemoteFile]

    def fetch(self, path: str, folder: Path) -> Path:
        """A small file of the commit.

        Raises:
            HubError: the Hub said no, or cannot be reached.
        """
        with translate_errors(self.repo_id, self.commit, doing="write"):
            return Path(self.api.hf_hub_download(self.repo_id, path, revision=self.commit, local_dir=folder))

    def is_small(self, path: str) -> bool:
        """Whether it is there, and is not a weights file."""
        return path in self.files and self.files[path].size <= _SMALL


def look(branch: Branch, sent: Mapping[str, UploadFile], manifest: Manifest, *, card_by_hand: bool) -> BranchFile:
    """Compare what a branch holds with what is to be sent.

    Args:
        branch: as it is now.
        sent: what it is to hold, by path.
        manifest: of what is sent.
        card_by_hand: the card that is sent was written by somebody, who knows the one that is there.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        card = {CARD_NAME} if card_by_hand or _may_replace_card(branch, sent, folder) else set()
        empty = not card_by_hand and bool(card) and _is_front_matter(folder)
        notes = [f"{CARD_NAME} there has a front matter and no text: it is replaced"] if empty else []
        there = branch.files.get(MANIFEST_NAME)
        same = there is not None and there.holds(sent[MANIFEST_NAME])
        theirs = manifest if same else _manifest(branch, folder)
        if theirs is None:
            return BranchFile(frozenset(card), _another_config(branch, sent, folder), tuple(notes))
        listed = {entry.path: entry for entry in theirs.files()}
        ours = {path for path, entry in listed.items() if _as_pushed(branch, entry, sent.get(path), folder)}
    notes += [line] if (line := other_schemes(manifest, theirs)) is not None else []
    return BranchFile(frozenset({*ours, *OWN_NAMES, *card}), other_model(manifest, theirs), tuple(notes))


def _manifest(branch: Branch, folder: Path) -> Manifest | None:
    """The manifest on the branch; ``None`` where there is none that can be read."""
    if not branch.is_small(MANIFEST_NAME):
        return None
    branch.fetch(MANIFEST_NAME, folder)
    try:
        return manifests.load(folder)
    except AoconvertError:
        return None


def _as_pushed(branch: Branch, entry: FileEntry, sent: UploadFile | None, folder: Path) -> bool:
    """Whether a file is what an earlier manifest says; one that does not change is not looked into."""
    there = branch.files.get(entry.path)
    if there is None or there.size != entry.size:
        return False
    if there.sha256 is not None:
        return there.sha256 == entry.sha256
    if sent is not None and there.holds(sent):
        return True
    return file_sha256(branch.fetch(entry.path, folder)) == entry.sha256


def _may_replace_card(branch: Branch, sent: Mapping[str, UploadFile], folder: Path) -> bool:
    """Whether the card on the branch is one that aoconvert wrote, or has no text, as where the Hub made it."""
    there = branch.files.get(CARD_NAME)
    if there is None or (CARD_NAME in sent and there.holds(sent[CARD_NAME])):
        return True
    if not branch.is_small(CARD_NAME):
        return False
    branch.fetch(CARD_NAME, folder)
    return not cards.is_edited(folder) or not cards.has_text(folder)


def _is_front_matter(folder: Path) -> bool:
    """Whether the card that was fetched has a front matter only: somebody chose a licence, say."""
    return (folder / CARD_NAME).is_file() and (folder / CARD_NAME).stat().st_size > 0 and not cards.has_text(folder)


def _another_config(branch: Branch, sent: Mapping[str, UploadFile], folder: Path) -> str | None:
    """What a repo without a manifest holds by its configs, where that is another model."""
    ours, theirs = (next((name for name in _CONFIGS if name in files), None) for files in (sent, branch.files))
    if ours is None or theirs is None or not branch.is_small(theirs):
        return None
    mine = _json(b"".join(sent[ours].blocks()))
    return other_config(mine, _json(branch.fetch(theirs, folder).read_bytes()))


def _json(content: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
