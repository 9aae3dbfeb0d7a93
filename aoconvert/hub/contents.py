"""What is sent, and everything about it that can be wrong before the network is asked."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from aoconvert.cards import CARD_NAME
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.bench import bench_of
from aoconvert.checkpoint.evaluation import evaluation_of
from aoconvert.checkpoint.files import content_problem, file_sha256, shadows
from aoconvert.checkpoint.manifest import (
    BENCH_NAME,
    EVAL_NAME,
    MANIFEST_NAME,
    OWN_NAMES,
    RELEASE_NAME,
    REPORT_NAME,
    SHEET_NAME,
    FileEntry,
    Manifest,
)
from aoconvert.checkpoint.release import release_of
from aoconvert.checkpoint.report import Report, read_report, some
from aoconvert.files import read_limited
from aoconvert.hub.types import PushOptions, UploadFile
from aoconvert.planning.overwriting import tidy
from aoconvert.progress import Progress
from aoconvert.sources.folder import list_folder, stays_inside

# https://huggingface.co/docs/hub/storage-limits
FILE_LIMIT = 50_000_000_000
FILE_RECOMMENDED = 20_000_000_000
_SHEET_BYTES = 64 << 20
_OWN = OWN_NAMES | {CARD_NAME}
VERIFY_HINT = "run aoconvert verify, or publish it unverified with --allow-unverified"


@dataclass(frozen=True)
class UploadContents:
    """What the folder holds that is to be sent, without the card.

    Attributes:
        manifest: as it was read.
        manifest_sha256: of ``aoconvert.json``.
        files: in the order of the manifest, then the manifest and the verification.
        hashed: paths whose SHA-256 was compared with the manifest's.
        problems: what forbids to send it, one line each.
        warnings: what whoever sends it should know, one line each.
    """

    manifest: Manifest
    manifest_sha256: str
    files: tuple[UploadFile, ...]
    hashed: frozenset[str]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def read_contents(folder: Path, repo_id: str, options: PushOptions, progress: Progress) -> UploadContents:
    """Look at a folder that is to be published.

    Raises:
        SourceError: it is no folder with a manifest that can be read.
    """
    tidy(folder)
    manifest = manifests.load(folder)
    manifest_sha256 = file_sha256(folder / MANIFEST_NAME)
    entries = {entry.path: entry for entry in manifest.files()}
    problems = [line for entry in entries.values() for line in _file_problems(folder, entry)]
    report, found = _verification(folder, manifest_sha256)
    warnings: list[str] = []
    (warnings if options.allow_unverified else problems).extend(found)
    hashed: frozenset[str] = frozenset()
    if not problems and options.rehash:
        problems += _rehash(folder, list(entries.values()), progress)
        hashed = frozenset(entries) if not problems else hashed
    elif report is not None and (late := find_changed_files(folder, entries)):
        problems.append(
            f"modified after the verification: {some(late)} (verify again, or compare the contents with --rehash)"
        )
    problems += shadows(folder, manifest.weights_by_folder())
    files = [UploadFile(entry.path, entry.size, entry.sha256, folder / entry.path) for entry in entries.values()]
    files.append(UploadFile.from_bytes(MANIFEST_NAME, manifests.read(folder)))
    if report is not None:
        files.append(UploadFile.from_bytes(REPORT_NAME, public_report(report.to_dict(), folder, repo_id)))
        warnings += _weak_spots(report)
    files += _measured(folder, repo_id)
    measured, notes = _evaluation(folder, repo_id)
    released, more = _release(folder)
    files += measured + released
    warnings += notes + more
    warnings += _large(files) + _find_left_out(folder, {file.path for file in files})
    return UploadContents(manifest, manifest_sha256, tuple(files), hashed, tuple(problems), tuple(warnings))


def _measured(folder: Path, repo_id: str) -> list[UploadFile]:
    """The report of a benchmark of this very checkpoint, if there is one."""
    found = bench_of(folder)
    if found is None:
        return []
    return [UploadFile.from_bytes(BENCH_NAME, public_report(found.to_dict(), folder, repo_id))]


def _file_problems(folder: Path, entry: FileEntry) -> Iterator[str]:
    """What is wrong with one file of the manifest."""
    parts = PurePosixPath(entry.path).parts
    place = folder / entry.path
    if entry.path in _OWN:
        yield f"the manifest lists {entry.path}, which push itself writes"
    elif any(part.startswith(".") or part == "__pycache__" for part in parts):
        yield f"the manifest lists {entry.path}, and hidden files are not sent"
    elif not place.is_file():
        yield f"{entry.path} is missing"
    elif not stays_inside(folder, entry.path):
        yield f"{entry.path} is a link that leaves the folder"
    elif not os.access(place, os.R_OK):
        yield f"{entry.path} cannot be read: no permission"
    elif place.stat().st_size != entry.size:
        yield f"{entry.path} has {place.stat().st_size} bytes, but the manifest says {entry.size}"
    elif entry.size > FILE_LIMIT:
        size = f"{entry.size / 1e9:.0f} GB"
        yield f"{entry.path} has {size}, and the Hub takes no file over 50 GB (quantize with --max-shard-size 20GB)"


def _verification(folder: Path, manifest_sha256: str) -> tuple[Report | None, list[str]]:
    """Read the report that belongs to this manifest, if there is one, and say what is wrong with it."""
    try:
        report = read_report(folder)
    except FileNotFoundError:
        return None, [f"not verified: there is no {REPORT_NAME}"]
    except (OSError, ValueError):
        return None, [f"not verified: {REPORT_NAME} cannot be read"]
    if report.manifest_sha256 != manifest_sha256:
        return None, [f"not verified: {REPORT_NAME} belongs to another {MANIFEST_NAME}"]
    if not report.ok:
        failed = ", ".join(check.name for check in report.failed)
        return report, [f"the verification failed: {failed or 'no check passed'}"]
    return report, []


def _evaluation(folder: Path, repo_id: str) -> tuple[list[UploadFile], list[str]]:
    """The evaluation and its sheet of pictures, where they belong to this manifest, and a note where they do not."""
    report = evaluation_of(folder)
    if report is None:
        there = (folder / EVAL_NAME).is_file()
        return [], [f"not sent: {EVAL_NAME} belongs to another {MANIFEST_NAME}, or cannot be read"] if there else []
    files = [UploadFile.from_bytes(EVAL_NAME, public_report(report.to_dict(), folder, repo_id))]
    if (folder / SHEET_NAME).is_file():
        files.append(UploadFile.from_bytes(SHEET_NAME, read_limited(folder / SHEET_NAME, _SHEET_BYTES)))
    return files, []


def _release(folder: Path) -> tuple[list[UploadFile], list[str]]:
    """The record of a release that this manifest belongs to, and a note where there is one that it does not."""
    found = release_of(folder)
    if found is not None:
        return [UploadFile.from_bytes(RELEASE_NAME, found[0].dump())], []
    there = (folder / RELEASE_NAME).is_file()
    return [], [f"not sent: {RELEASE_NAME} does not name this {MANIFEST_NAME}, or cannot be read"] if there else []


def _weak_spots(report: Report) -> list[str]:
    """Say what a verification that passed did not look at."""
    reload = report.check("reload")
    if not report.ok or (reload is not None and reload.status == "passed"):
        return []
    why = reload.detail if reload is not None else "it was not requested"
    return [f"the verification did not open the model ({why})"]


def find_changed_files(folder: Path, paths: Iterable[str]) -> list[str]:
    """Those of the files that were written after the last verification.

    Raises:
        OSError: there is no report of one.
    """
    limit = (folder / REPORT_NAME).stat().st_mtime_ns
    return [path for path in paths if (folder / path).is_file() and (folder / path).stat().st_mtime_ns > limit]


def _rehash(folder: Path, entries: list[FileEntry], progress: Progress) -> list[str]:
    """Compare the content of each file with the manifest."""
    problems = []
    progress.start("hash", sum(entry.size for entry in entries))
    for entry in entries:
        if (problem := content_problem(folder, entry)) is not None:
            problems.append(problem)
        progress.advance(entry.size, entry.path)
    progress.finish()
    return problems


def _large(files: list[UploadFile]) -> list[str]:
    names = [file.path for file in files if FILE_RECOMMENDED < file.size <= FILE_LIMIT]
    return [f"over 20 GB, which the Hub advises against: {some(names)}"] if names else []


def _find_left_out(folder: Path, sent: set[str]) -> list[str]:
    """Files of the folder that nobody vouches for; hidden ones are not mentioned."""
    names = [
        path
        for path in list_folder(folder, folder.name)
        if path not in sent | _OWN
        and not any(part.startswith(".") or part == "__pycache__" for part in path.split("/"))
    ]
    return [f"not sent, because the manifest does not list them: {some(names)}"] if names else []


def public_report(report: dict[str, Any], folder: Path, repo_id: str) -> bytes:
    """A verification as it is published: the repo's name in place of the folder's, and no path of this machine."""
    places = {str(folder.resolve()): ".", str(folder.absolute()): ".", str(Path.home()): "~"}
    places[tempfile.gettempdir()] = "TMP"

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for place, shown in places.items():
                value = value if place == "/" else value.replace(place, shown)
            return value
        if isinstance(value, list):
            return [clean(item) for item in value]
        return {key: clean(item) for key, item in value.items()} if isinstance(value, dict) else value

    cleaned = {**clean(report), "path": repo_id}
    return (json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n").encode()
