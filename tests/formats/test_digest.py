"""The digest of a weights file, from what is read of it; what an earlier run read, checked; a file that changes."""

import hashlib
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aoconvert.errors import ReadError
from aoconvert.formats.digest import FileDigest, Mark

SIZE = 300_000  # of chunks of 128 KiB: two and a part
CONTENT = b"".join(hashlib.sha256(number.to_bytes(4)).digest() for number in range(SIZE // 32))
CHANGED = "changed while it was read"


def fed(digest, content, ranges):
    for start, stop in ranges:
        digest.feed(start, bytes(content[start:stop]))


def rewrite(path, content):
    """In place, size and time of the last change as they were."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def flipped(at):
    content = bytearray(CONTENT)
    content[at] ^= 1
    return bytes(content)


places = st.integers(0, len(CONTENT)) | st.sampled_from([0, 1, 1 << 17, (1 << 17) - 1, (1 << 18) + 1, len(CONTENT)])
ranges = st.lists(
    st.tuples(places, places).map(lambda pair: tuple(sorted(pair))).filter(lambda pair: pair[0] < pair[1]), max_size=6
)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


@settings(max_examples=100, deadline=None)
@given(before=ranges, after=ranges, damage=st.none() | st.integers(0, len(CONTENT) - 1))
def test_any_order_and_a_stop_in_between(tmp_path_factory, before, after, damage):
    """The whole file's digest whatever was read, and a change in what was read is seen."""
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(CONTENT)
    first = FileDigest(path)
    marks = []
    for one in before:
        fed(first, CONTENT, [one])
        marks.append(first.mark())
        assert first.mark() is None
    seen = max((mark.position for mark in marks), default=0)
    now = CONTENT if damage is None else flipped(damage)
    path.write_bytes(now)
    reported = []
    second = FileDigest.resume(path, marks, reported.append)
    if damage is not None and damage < seen:
        assert second is None
        return
    fed(second, now, after)
    assert second.finish() == hashlib.sha256(now).hexdigest()
    assert sum(reported) >= seen


@settings(max_examples=60, deadline=None)
@given(stop=places, read=ranges, at=st.integers(0, len(CONTENT) - 1), again=st.tuples(places, places).map(sorted))
def test_what_is_used_is_what_was_hashed(tmp_path_factory, stop, read, at, again):
    """Bytes that were hashed ahead, in a gap or with an earlier tensor, and come in another form: refused at once."""
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(CONTENT)
    digest = FileDigest(path)
    digest.ahead(stop, threading.Event())
    fed(digest, CONTENT, read)
    start, end = again
    hashed = digest.mark(again=True).position
    rewrite(path, flipped(at))
    if at >= hashed:  # it never was anything else
        fed(digest, flipped(at), [again])
        assert digest.finish() == hashlib.sha256(flipped(at)).hexdigest()
        return
    with pytest.raises(ReadError, match=CHANGED):
        fed(digest, flipped(at), [again])
        assert not start <= at < end, "it was used"
        digest.finish()


@pytest.mark.parametrize("change", ["rewritten", "replaced", "longer", "shorter", "gone"])
@pytest.mark.parametrize("ahead", [0, 1 << 17, SIZE])
@pytest.mark.parametrize("rest", ["read", "hashed"])
def test_a_file_that_changes_in_the_middle(path, change, ahead, rest):
    """Also what was read before and after would be right for itself."""
    now = flipped(7)
    digest = FileDigest(path)
    digest.ahead(ahead, threading.Event())
    fed(digest, CONTENT, [(0, 200_000)])
    if change == "rewritten":
        rewrite(path, now)
    elif change == "replaced":
        (path.parent / "new").write_bytes(now)
        os.utime(path.parent / "new", ns=(0, path.stat().st_mtime_ns))
        (path.parent / "new").replace(path)
    elif change == "longer":
        path.write_bytes(CONTENT + b"more")
    elif change == "shorter":
        path.write_bytes(CONTENT[:100_000])
    else:
        path.unlink()
    with pytest.raises(ReadError, match=f"{CHANGED}|cannot be read"):
        if rest == "read":
            fed(digest, CONTENT, [(200_000, len(CONTENT))])
        digest.finish()


def test_what_does_not_change_the_bytes_is_no_change(path):
    digest = FileDigest(path)
    fed(digest, CONTENT, [(0, 1000)])
    path.chmod(0o400)
    os.link(path, path.parent / "other name")
    os.utime(path)
    assert digest.finish() == hashlib.sha256(CONTENT).hexdigest()


def test_what_the_hub_names_needs_no_proof(path):
    digest = FileDigest(path)
    fed(digest, CONTENT, [(0, len(CONTENT))])
    rewrite(path, flipped(3))
    expected = hashlib.sha256(CONTENT).hexdigest()
    assert digest.finish(expected) == expected


@settings(max_examples=60, deadline=None)
@given(stop=st.integers(0, len(CONTENT) + 100), after=ranges)
def test_hashed_ahead(tmp_path_factory, stop, after):
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(CONTENT)
    digest = FileDigest(path)
    digest.ahead(stop, threading.Event())
    for one in after:
        fed(digest, CONTENT, [one])
        mark = digest.mark()
        assert mark.position >= max(one[1], min(stop, len(CONTENT)))
        assert mark.sha256 == hashlib.sha256(CONTENT[: mark.position]).hexdigest()
    assert digest.finish() == hashlib.sha256(CONTENT).hexdigest()


def test_in_order_nothing_is_read_twice(path):
    """A file that was there before is read once, in order or ahead."""
    old = path.stat().st_ctime_ns
    while FileDigest(path)._began < old + 1_100_000_000:
        threading.Event().wait(0.2)

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    digest = FileDigest(path)
    before = bytes_read()
    edges = range(0, len(CONTENT) + 1, len(CONTENT) // 5)
    fed(digest, CONTENT, list(pairwise(edges)))
    assert digest.finish() == hashlib.sha256(CONTENT).hexdigest()
    assert bytes_read() - before < 20_000


def test_ahead_gives_up(path):
    digest, stop = FileDigest(path), threading.Event()
    stop.set()
    digest.ahead(100, stop)
    fed(digest, CONTENT, [(0, 10)])
    assert digest.mark().position == 10
    FileDigest(path.parent / "none").ahead(100, threading.Event())  # whoever reads it will say so


def test_a_file_that_is_gone_or_short(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    mark = Mark(3, hashlib.sha256(b"abc").hexdigest())
    path.write_bytes(b"ab")
    assert FileDigest.resume(path, [mark], lambda nbytes: None) is None
    digest = FileDigest(path)
    with pytest.raises(ReadError, match=CHANGED):
        digest.feed(10, b"a")
    path.unlink()
    with pytest.raises(ReadError, match="cannot be read"):
        FileDigest.resume(path, [mark], lambda nbytes: None)


@pytest.mark.parametrize("kind", ["fifo", "folder", "/dev/zero"])
def test_only_regular_files(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with pytest.raises(ReadError, match="is not a regular file"):
        FileDigest(path).finish()
