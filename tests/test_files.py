"""Files in folders that somebody else made: regular ones only, and never through a link."""

import os
import threading
from pathlib import Path

import pytest

from aoconvert.files import check_replaceable, open_regular, read_limited, write_whole


def make(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a fifo":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    else:
        path.symlink_to("/dev/zero")


KINDS = ["fifo", "folder", "link to a fifo", "device"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(tmp_path, kind):
    make(tmp_path / "file", kind)
    for read in (open_regular, lambda path: read_limited(path, 100)):
        with pytest.raises(OSError, match="is not a regular file"):
            read(tmp_path / "file")


def test_only_so_much_is_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    assert read_limited(tmp_path / "file", 100) == bytes(100)
    with pytest.raises(OSError, match="is larger than 99 bytes"):
        read_limited(tmp_path / "file", 99)
    (tmp_path / "link").symlink_to("file")
    assert read_limited(tmp_path / "link", 100) == bytes(100)
    with pytest.raises(OSError, match="symbolic links"):
        read_limited(tmp_path / "link", 100, follow=False)


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    make(tmp_path / "file", kind)
    for write in (lambda: write_whole(tmp_path / "file", b"new"), lambda: check_replaceable(tmp_path / "file")):
        with pytest.raises(OSError, match="is not a regular file"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("target", ["precious", "nowhere", "/dev/null"])
def test_a_link_is_replaced_and_not_followed(tmp_path, target):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "precious").write_text("precious")
    (folder / "file").symlink_to(target if target.startswith("/") else f"../{target}")
    check_replaceable(folder / "file")
    write_whole(folder / "file", b"new")
    assert not (folder / "file").is_symlink()
    assert (folder / "file").read_bytes() == b"new"
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_hard_link_is_replaced_too(tmp_path):
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", tmp_path / "file")
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_text() == "precious"


def test_old_or_new(tmp_path):
    """Whoever reads while it is written sees the one or the other."""
    path, stop, seen = tmp_path / "file", threading.Event(), set()
    write_whole(path, b"a" * 100_000)

    def read():
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for letter in b"bcde" * 10:
        write_whole(path, bytes([letter]) * 100_000)
    stop.set()
    reader.join()
    assert seen <= {bytes([letter]) * 100_000 for letter in b"abcde"}


def test_nothing_is_left_where_it_fails(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="too long"):
        write_whole(tmp_path / ("x" * 300), b"new")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "file", "text")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]
