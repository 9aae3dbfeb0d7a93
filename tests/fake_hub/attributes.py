"""Which files of a repo go to the large-file storage, and which are ignored.

The default ``.gitattributes`` is the one that the Hub puts into a new model repo. Patterns are matched by pathspec.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

# A regular file may not be larger: https://huggingface.co/docs/hub/repositories-getting-started
REGULAR_LIMIT = 10 << 20

_PATTERNS = """*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz
*.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz
*.wasm *.xz *.zip *.zst *tfevents*"""

DEFAULT_GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _PATTERNS.split())


def lfs_patterns(gitattributes: str) -> tuple[str, ...]:
    lines = (line.split() for line in gitattributes.splitlines() if not line.startswith("#"))
    return tuple(words[0] for words in lines if "filter=lfs" in words[1:])


def matches(path: str, patterns: Iterable[str]) -> bool:
    return bool(_spec(tuple(patterns)).match_file(path))


def is_lfs(path: str, gitattributes: str = DEFAULT_GITATTRIBUTES) -> bool:
    return matches(path, lfs_patterns(gitattributes))


@lru_cache
def _spec(patterns: tuple[str, ...]) -> Any:
    import pathspec

    return pathspec.PathSpec.from_lines("gitignore", patterns)
