"""The empty cache that a published checkpoint is opened with: where it is, what a process sees, what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from aoconvert.checkpoint.published import Published
from aoconvert.errors import VerificationError

COMMIT = "0" * 40


def test_what_a_killed_run_left_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    home = tmp_path / "home"
    published = Published("me/x", COMMIT, None, 1)
    left, elsewhere = home / ".aoconvert-empty-old", home.parent / "mine"
    for folder in (left, elsewhere):
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
    (home / "hub").mkdir()
    (home / ".aoconvert-empty-link").symlink_to(elsewhere)
    (home / ".aoconvert-empty-new").mkdir()  # its lock comes in a moment
    with published.empty_cache(home) as first, published.empty_cache(home) as second:
        assert not left.exists()
        assert first.is_dir() and second.is_dir() and first != second
        assert (home / ".aoconvert-empty-new").is_dir()
    assert {path.name for path in home.iterdir()} == {"hub", ".aoconvert-empty-link", ".aoconvert-empty-new"}
    assert (elsewhere / ".lock").exists()


def test_a_disk_without_room(tmp_path: Path) -> None:
    with (
        pytest.raises(VerificationError, match=r"the files need 10000\.00 TB in an empty cache"),
        Published("me/x", COMMIT, None, 10**16).empty_cache(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_the_process_sees(tmp_path: Path) -> None:
    """The same endpoint, proxies and account; none of the caches; nothing that asks a bot for a conversion."""
    user = {"HF_ENDPOINT": "http://x", "HTTPS_PROXY": "p", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "c", "PATH": "/bin"}
    user |= {"HF_TOKEN": "hf_other", "HF_HOME": "h", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}
    seen = Published("me/x", COMMIT, None, 1, "hf_mine").environment(user, tmp_path)
    same = {"HF_ENDPOINT": "http://x", "HTTPS_PROXY": "p", "PATH": "/bin", "HF_HUB_DISABLE_XET": "1"}
    ours = {"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_mine", "DISABLE_SAFETENSORS_CONVERSION": "1"}
    assert {name: seen[name] for name in (*same, *ours)} == {**same, **ours}
    assert not {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"} & set(seen)
    assert "hf_mine" not in repr(Published("me/x", COMMIT, None, 1, "hf_mine"))


def test_other_files_are_named(tmp_path: Path) -> None:
    for name in ("models--me--x/snapshots/" + COMMIT, "models--org--base/snapshots/" + "1" * 40):
        (tmp_path / "hub" / name).mkdir(parents=True)
    published = Published("me/x", COMMIT, "main", 1)
    assert published.other_files(tmp_path) == ["org/base at 111111111111"]
    assert published.to_dict() == {"repo_id": "me/x", "revision": "main", "commit": COMMIT}
