"""Are the files of a checkpoint those that its manifest lists, and would a loader take others first?"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from aoconvert.files import open_regular
from aoconvert.manifest import Manifest
from aoconvert.sources.folder import list_folder, stays_inside

_CHUNK = 1 << 22
# made later than the manifest, or by the Hub; no loader looks at them
_BESIDE = re.compile(
    r"aoconvert(\.verify)?\.json|README\.md|\.gitattributes|(.*/)?(LICEN[CS]E|NOTICE)[^/]*|.*\.(svg|png|jpe?g|gif|webp|mp4)",
    re.IGNORECASE,
)
# what diffusers and transformers look for, with any variant and shard number
LOADED = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)([.-][^/]*)?\.(safetensors|bin)(\.index[^/]*\.json)?"
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
            problems.append(f"{path} has {place.stat().st_size} bytes, the manifest says {entry.size}")
        else:
            hashed += entry.size
            if file_sha256(place) != entry.sha256:
                problems.append(f"{path} is not the file the manifest lists (its SHA-256 differs)")
    problems += [f"{path} is not in the manifest" for path in unlisted(folder, set(listed))]
    return problems, hashed


def unlisted(folder: Path, listed: set[str]) -> list[str]:
    """Files that a loader could look at and that nobody vouches for."""
    found = list_folder(folder, folder.name)
    return [path for path in found if path not in listed and not _BESIDE.fullmatch(path)]


def shadows(folder: Path, parts: dict[str, tuple[str, ...]]) -> list[str]:
    """Files that a loader prefers to a component's ``.bin`` files.

    Args:
        folder: the checkpoint.
        parts: folder of each quantized model, and its ``.bin`` files.
    """
    problems = []
    for where, files in parts.items():
        names = {Path(file).name for file in files}
        for path in sorted((folder / where).glob("*")):
            if path.name not in names and LOADED.fullmatch(path.name) and not path.name.endswith(".bin.index.json"):
                problems.append(f"{path.relative_to(folder).as_posix()} would be loaded in place of {', '.join(names)}")
    return problems


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
