"""Are the files of a checkpoint those that its manifest lists, and would a loader take others first?"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from aoconvert.checkpoint.manifest import CARD_BYTES, CARD_NAME, MANIFEST_NAME, FileEntry, Manifest
from aoconvert.checkpoint.seals import is_sealed
from aoconvert.files import open_regular, read_limited
from aoconvert.formats.registry import FORMATS
from aoconvert.json_text import CONFIG_BYTES, parse_json
from aoconvert.sources.folder import list_folder, stays_inside
from aoconvert.sources.weights import STEMS

# made later than the manifest, by the Hub, or notes and samples that somebody put beside it; no loader looks at them
_BESIDE = re.compile(
    r"aoconvert(\.(verify|bench|eval))?\.json|release\.json|\.gitattributes|(.*/)?(LICEN[CS]E|NOTICE)[^/]*"
    r"|.*\.(md|rst|ipynb|pdf|csv|svg|png|jpe?g|gif|webp|avif|mp4|webm|mov|mkv|wav|mp3|flac|ogg)"
    r"|(samples?|examples?|assets|images|media|docs)/.*\.(txt|jsonl?)",
    re.IGNORECASE,
)
# what diffusers and transformers look for, with any variant and shard number
LOADED = re.compile(
    rf"({'|'.join(sorted({stem for stems in STEMS.values() for stem in stems.values()}))})([.-][^/]*)?"
    rf"({'|'.join(re.escape(entry.suffix) for entry in FORMATS.values())})(\.index[^/]*\.json)?"
)


def check_files(folder: Path, manifest: Manifest) -> tuple[list[str], int]:
    """Compare the folder with the manifest.

    Returns:
        What is wrong, one line each, and the number of bytes that were hashed.
    """
    problems: list[str] = []
    hashed = 0
    listed = {entry.path: entry for entry in manifest.files()}
    for path, entry in listed.items():
        place = folder / path
        if not place.is_file():
            problems.append(f"{path} is missing")
        elif not stays_inside(folder, path):
            problems.append(f"{path} is a link that leaves the folder")
        elif place.stat().st_size != entry.size:
            problems.append(f"{path} has {place.stat().st_size} bytes, but the manifest says {entry.size}")
        else:
            hashed += entry.size
            if (problem := content_problem(folder, entry)) is not None:
                problems.append(problem)
    problems += [f"{path} is not in the manifest" for path in find_unlisted(folder, set(listed))]
    return problems, hashed


def content_problem(folder: Path, entry: FileEntry) -> str | None:
    """Why a file's content is not what the manifest says, or cannot be told; ``None`` where it is."""
    try:
        same = file_sha256(folder / entry.path) == entry.sha256
    except OSError as error:
        return f"{entry.path} cannot be read: {error.strerror}"
    return None if same else other_content(entry.path)


def other_content(path: str) -> str:
    """The problem of a file that was changed."""
    return f"{path} is not the file that the manifest lists (its SHA-256 differs)"


def find_unlisted(folder: Path, listed: set[str]) -> list[str]:
    """Files that a loader could look at and that nobody vouches for."""
    found = list_folder(folder, folder.name)
    return [path for path in found if path not in listed and not _BESIDE.fullmatch(path)]


def shadows(folder: Path, parts: Mapping[str, tuple[str, ...]], listed: Collection[str] = ()) -> list[str]:
    """What has a loader take other weights than a component's files, or more.

    Files with names that it prefers; a ``config.json`` that names the file (``transformers_weights``); an adapter,
    which transformers loads on top where peft is installed.

    Args:
        folder: the checkpoint.
        parts: folder of each quantized model, and its weights files.
        listed: files that a manifest vouches for: an adapter among them belongs to the model.
    """
    problems = []
    for where, files in parts.items():
        names = {Path(file).name for file in files}
        index = tuple(f"{suffix}.index.json" for suffix in {Path(file).suffix for file in files})
        for path in sorted((folder / where).glob("*")):
            if path.name not in names and LOADED.fullmatch(path.name) and not path.name.endswith(index):
                problems.append(f"{path.relative_to(folder).as_posix()} would be loaded in place of {', '.join(names)}")
        path = folder / where / "config.json"
        named = _json(path).get("transformers_weights")
        if named is not None and {named} != names:
            problems.append(f"{path.relative_to(folder).as_posix()} has transformers load {str(named)[:100]!r}")
        path = folder / where / _ADAPTER
        if path.is_file() and path.relative_to(folder).as_posix() not in listed:
            shown = path.relative_to(folder).as_posix()
            problems.append(
                f"{shown} is an adapter, which transformers loads on top of the weights where peft is installed"
            )
    return problems


def notes(folder: Path) -> list[str]:
    """What is beside the weights and has a say in what is opened (an adapter, code inside the checkpoint), and a card
    that is not aoconvert's.
    """
    found = []
    with contextlib.suppress(OSError):
        if not is_sealed(read_limited(folder / CARD_NAME, CARD_BYTES)):
            found.append(f"{CARD_NAME} was edited by hand")
    for path in list_folder(folder, folder.name):
        name = Path(path).name
        if name == _ADAPTER:
            found.append(f"{path} is an adapter, loaded on top where peft is installed")
        elif _OWN_CODE.fullmatch(name) and _json(folder / path).get("auto_map"):
            found.append(f"{path} names code inside the checkpoint (auto_map), run only with trust_remote_code")
    return found


_ADAPTER = "adapter_config.json"
_OWN_CODE = re.compile(r"(\w+_)?config\.json")


def _json(path: Path) -> Mapping[str, object]:
    """A file's JSON object; an empty one where there is none."""
    try:
        values = parse_json(read_limited(path, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Tied(Protocol):
    """A report that names the manifest that it is of."""

    @property
    def manifest_sha256(self) -> str | None: ...


T = TypeVar("T", bound=_Tied)


def belongs(report: T, folder: Path) -> T | None:
    """Give a report only where it is of the manifest in the folder.

    Raises:
        OSError: there is no manifest.
    """
    return report if report.manifest_sha256 == file_sha256(folder / MANIFEST_NAME) else None
