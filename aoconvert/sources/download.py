"""Fetching files of a source, with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence

from aoconvert.progress import Progress
from aoconvert.sources.base import Source


def download(source: Source, paths: Sequence[str], progress: Progress) -> None:
    """Fetch files that are not on this machine; nothing for a folder.

    Args:
        source: whose files they are.
        paths: of the files, relative to the source.
        progress: is told of the bytes.

    Raises:
        HubError: as ``Source.fetch``.
    """
    if not paths or not source.is_remote:
        return
    progress.start("download", sum(source.files()[path].size for path in paths))
    done = 0

    def report(fetched: int, _: int) -> None:
        nonlocal done
        progress.advance(fetched - done)
        done = fetched

    source.fetch(paths, report)
    progress.finish()
