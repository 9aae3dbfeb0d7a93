"""How much memory a program that is started now may take, and how much one has."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
_UNKNOWN = 1 << 62


def available_bytes() -> int:
    """What the kernel calls available, or what the process's control group has left, whichever is less.

    Without ``/proc`` nobody knows, and a very large number is returned.
    Sources: proc_meminfo(5); the kernel's Documentation/admin-guide/cgroup-v2.rst.
    """
    return min([_UNKNOWN, *_machine(), *_group()])


def anonymous_bytes(process: int) -> int:
    """What a process has of its own, without the files that it has mapped; 0 where nobody knows, or it has ended.

    Source: ``RssAnon`` of proc_pid_status(5).
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _machine() -> list[int]:
    if not _MEMINFO.is_file():
        return []
    lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _group() -> list[int]:
    """What is left in the group and those around it; of version 1, in the one that is mounted here."""
    left = []
    for folder in _group_folders():
        limit, used = (_number(folder / name) for name in ("memory.max", "memory.current"))
        if limit is not None and used is not None:
            left.append(max(0, limit - used))
    first = _GROUPS / "memory"
    limit, used = (_number(first / f"memory.{name}_in_bytes") for name in ("limit", "usage"))
    if limit is not None and used is not None:
        left.append(max(0, limit - used))
    return left


def _group_folders() -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = [line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")]
    return [folder for path in paths for folder in (_GROUPS / path, *(_GROUPS / path).parents) if _inside(folder)]


def _inside(folder: Path) -> bool:
    return folder == _GROUPS or _GROUPS in folder.parents


def _number(path: Path) -> int | None:
    """A file's one number; ``None`` where there is no file, or no limit (``max``)."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
