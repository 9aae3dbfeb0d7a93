"""The original that a checkpoint is compared with: as it was when the checkpoint was made."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import Part
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import FileEntry, SourceEntry
from aoconvert.checkpoint.report import Status, some
from aoconvert.errors import HubError, SourceError, UsageError
from aoconvert.humanize import plural
from aoconvert.models.gguf import quantization
from aoconvert.options import DEFAULT_HUB, HubOptions
from aoconvert.sources import SINGLE_FILE_SUFFIXES, Source, resolve
from aoconvert.sources.bundle import INDEX
from aoconvert.sources.file import CONFIG, FileSource
from aoconvert.sources.folder import FolderSource
from aoconvert.sources.references import parse_repo


def check_reference(reference: str) -> None:
    """Refuse what names neither a folder, a weights file nor a repo, before anything is fetched or loaded.

    Raises:
        UsageError: it does not.
    """
    place = Path(reference).expanduser()
    if place.is_dir() or _is_single_file(place):
        return
    try:
        parse_repo(reference)
    except SourceError as error:
        raise UsageError(f"--source: {error.message}", hint=error.hint) from error


def resolve_original(
    reference: str, checkpoint: Path, hub: HubOptions = DEFAULT_HUB, *, trust_remote_code: bool = False
) -> Source:
    """The source to compare with.

    Args:
        reference: a folder, a weights file or a repo.
        checkpoint: the checkpoint's folder. A repo that its manifest names is taken at the commit that was quantized.
        hub, trust_remote_code: as for :func:`aoconvert.sources.resolve`; a revision is taken in place of that commit.

    Raises:
        UsageError: neither a folder, a weights file nor a repo; a revision of a folder or file.
        HubError: the Hub said no.
    """
    place = Path(reference).expanduser()
    if hub.revision is None and _is_single_file(place):
        return _with_config(FileSource(place), checkpoint, hub)
    try:
        pinned = replace(hub, revision=hub.revision or _find_commit(reference, checkpoint))
        return resolve(reference, pinned, trust_remote_code=trust_remote_code)
    except SourceError as error:
        raise UsageError(f"--source: {error.message}", hint=error.hint) from error


def _is_single_file(place: Path) -> bool:
    return place.is_file() and place.suffix in SINGLE_FILE_SUFFIXES


def _with_config(source: FileSource, checkpoint: Path, hub: HubOptions) -> FileSource:
    """The file with the config that the manifest names, where that can be had; else with that of the checkpoint."""
    from aoconvert.models import identify
    from aoconvert.models.single_file import add_config, open_bundle

    around = FolderSource(checkpoint)
    whole = around.has(INDEX)
    try:
        made_of = manifests.load(checkpoint).source
        if (named := made_of.config) is not None and named.repo_id is not None:
            found = add_config(source, f"{named.repo_id}@{named.revision}", made_of.subfolder, hub, whole=whole)
            return found if whole else FileSource(source.place, found.config, found.origin)
    except (SourceError, HubError, UsageError):  # a repo that is gone, no network; a bad manifest is said later
        pass
    if whole:
        bundle = open_bundle(source, around, identify(around), None)
        return bundle if isinstance(bundle, FileSource) else source
    return FileSource(source.place, _config(checkpoint, source.place))


def _config(checkpoint: Path, place: Path) -> Mapping[str, Any] | None:
    """The checkpoint's config without what quantizing added: that of the file it was made of.

    Raises:
        SourceError: a GGUF file that is damaged.
    """
    folder = FolderSource(checkpoint)
    config = folder.read_json(CONFIG) if folder.has(CONFIG) else None
    if not isinstance(config, dict):
        return None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**plain, "quantization_config": quantization(place)} if place.suffix.lower() == ".gguf" else plain


def _find_commit(reference: str, checkpoint: Path) -> str | None:
    """The commit that the manifest names, where it names this repo; what is wrong with a manifest is said later."""
    if Path(reference).expanduser().exists():
        return None
    try:
        source = manifests.load(checkpoint).source
    except SourceError:
        return None
    repo_id, revision = parse_repo(reference)
    return source.revision if revision is None and repo_id == source.repo_id else None


def other_numbers(part: Part, folder: Path) -> Iterator[str]:
    """Whole numbers of a config in which an original differs, as the sizes of another model of the same class do.

    Args:
        part: of the checkpoint.
        folder: of the original.
    """
    source = FolderSource(folder)
    before = _numbers(source.read_json(CONFIG) if source.has(CONFIG) else {}, "")
    after = _numbers(part.config, "")
    for name, number in before.items():
        if after.get(name, number) != number:
            yield f"the source is another model: its {name} is {number}, the result's is {after[name]}"


def _numbers(config: Any, name: str) -> dict[str, int]:
    """Whole numbers of a config, those inside it too, by their paths."""
    if isinstance(config, Mapping):
        found: dict[str, int] = {}
        for key in sorted(config):
            if key not in ("quantization_config", "_name_or_path"):
                found |= _numbers(config[key], f"{name}.{key}".removeprefix("."))
        return found
    return {name: config} if isinstance(config, int) and not isinstance(config, bool) else {}


def find_loras(made_of: SourceEntry, given: Sequence[str]) -> list[str] | None:
    """The LoRAs that were added, as ``--lora`` takes them; ``None`` where a file of one is not given.

    Args:
        made_of: what the manifest says of the source.
        given: paths of files.
    """
    files = {Path(path).name: path for path in given}
    found = []
    for lora in made_of.loras:
        name = posixpath.basename(lora.path)
        if name in files:
            found.append(f"{Path(files[name]).expanduser().absolute()}@{lora.weight:g}")
        elif lora.repo_id is not None:
            found.append(f"{lora.repo_id}/{lora.path}@{lora.revision}@{lora.weight:g}")
        else:
            return None
    return found


def check_source(source: Source, made_of: SourceEntry) -> tuple[Status, str]:
    """Whether a source is what a checkpoint was made of: the very weights files, by their SHA-256.

    Args:
        source: the original that was given.
        made_of: what the manifest says of it.

    Raises:
        SourceError, HubError, OSError: a file cannot be read.
    """
    if not made_of.files:
        return "skipped", "the manifest names no file of the source"
    problems = list(_other_files(source, made_of))
    if not problems:
        return "passed", f"{plural(len(made_of.files), 'weights file')} with the SHA-256 of what was quantized"
    return "failed", f"{source.label} is not what was quantized{_commits(source, made_of)}: {some(problems, 2)}"


def _other_files(source: Source, made_of: SourceEntry) -> Iterator[str]:
    for entry in made_of.files:
        path = _place(source, entry)
        if path is None:
            yield f"{entry.path} is missing"
            continue
        found = source.files()[path]
        if found.size != entry.size:
            yield f"{path} has {found.size} bytes, what was read had {entry.size}"
        elif _sha256(source, path) != entry.sha256:
            yield f"{path} has a different SHA-256"


def _place(source: Source, entry: FileEntry) -> str | None:
    """The file's path in the source, which may be the folder of one part alone."""
    names = (entry.path, posixpath.basename(entry.path))
    return next((name for name in names if name in source.files()), None)


def _sha256(source: Source, path: str) -> str:
    """As the Hub names it, or of the file."""
    known = source.files()[path].sha256
    if known is not None:
        return known
    source.fetch([path])
    return file_sha256(source.local(path))


def _commits(source: Source, made_of: SourceEntry) -> str:
    if source.revision is None or made_of.revision is None or source.revision == made_of.revision:
        return ""
    return f" (commit {source.revision[:12]}, but the manifest says {made_of.revision[:12]})"
