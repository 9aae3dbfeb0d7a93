"""The digest of a weights file, from what is read of it; and what an earlier run read, checked."""

import hashlib
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aoconvert.errors import ReadError
from aoconvert.readers.digest import FileDigest, Mark


def fed(digest, content, ranges):
    for start, stop in ranges:
        digest.feed(start, torch.tensor(list(content[start:stop]), dtype=torch.uint8))


ranges = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)).map(lambda pair: tuple(sorted(pair))), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(min_size=200, max_size=220), before=ranges, after=ranges, damage=st.none() | st.integers(0, 199)
)
def test_any_order_and_a_stop_in_between(tmp_path_factory, content, before, after, damage):
    """The whole file's digest whatever was read, and a change in what was read is seen."""
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(content)
    first = FileDigest(path)
    marks = []
    for one in before:
        fed(first, content, [one])
        marks.append(first.mark())
        assert first.mark() is None
    seen = {at for start, stop in before for at in range(start, stop)}
    seen |= set(range(max((mark.position for mark in marks), default=0)))
    now = bytearray(content)
    if damage is not None:
        now[damage] ^= 1
    path.write_bytes(now)
    reported = []
    second = FileDigest.resumed(path, marks, reported.append)
    if damage in seen:
        assert second is None
        return
    fed(second, now, after)
    assert second.finish() == hashlib.sha256(now).hexdigest()
    assert sum(reported) >= max((mark.position for mark in marks), default=0)


def test_a_file_in_order_is_read_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    digest = FileDigest(path)
    fed(digest, bytes(100), [(0, 40), (40, 100)])
    path.unlink()
    path.write_bytes(b"")  # nothing is left to read
    assert digest.finish() == hashlib.sha256(bytes(100)).hexdigest()


@settings(max_examples=60, deadline=None)
@given(content=st.binary(min_size=200, max_size=220), stop=st.integers(0, 300), after=ranges)
def test_hashed_ahead(tmp_path_factory, content, stop, after):
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(content)
    digest = FileDigest(path)
    digest.ahead(stop, threading.Event())
    for one in after:
        fed(digest, content, [one])
        mark = digest.mark()
        assert mark.position >= max(one[1], min(stop, len(content)))
        assert mark.sha256 == hashlib.sha256(content[: mark.position]).hexdigest()
    assert digest.finish() == hashlib.sha256(content).hexdigest()


def test_ahead_gives_up(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    digest, stop = FileDigest(path), threading.Event()
    stop.set()
    digest.ahead(100, stop)
    fed(digest, bytes(100), [(0, 10)])
    assert digest.mark().position == 10
    FileDigest(tmp_path / "none").ahead(100, threading.Event())  # whoever reads it will say so


def test_a_file_that_is_gone_or_short(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    mark = Mark(3, hashlib.sha256(b"abc").hexdigest())
    path.write_bytes(b"ab")
    assert FileDigest.resumed(path, [mark], lambda nbytes: None) is None
    digest = FileDigest(path)
    with pytest.raises(ReadError, match="became shorter"):
        digest.feed(10, torch.zeros(1, dtype=torch.uint8))
    path.unlink()
    with pytest.raises(ReadError, match="cannot be read"):
        FileDigest.resumed(path, [mark], lambda nbytes: None)
