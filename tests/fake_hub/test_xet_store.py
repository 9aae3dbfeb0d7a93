"""What the loopback Xet store takes and what it refuses, with bodies that the released hf_xet sent."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_hub.xet_client import KeepingStore, xet_client
from fake_hub.xet_format import FormatError, decode_lz4_frame, parse_shard
from fake_hub.xet_hash import keyed_hashes
from fake_hub.xet_store import Refused, XetStore

CONTENT = b"".join(b"%d: the same words in every line\n" % number for number in range(6_000))


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes, bytes]:
    """The name and the body of a xorb, and the shard of the file in it, as hf_xet sent them."""
    with xet_client(tmp_path_factory.mktemp("bodies")) as client:
        client.upload(client.write("file", CONTENT))
        store = client.cas.store
        assert isinstance(store, KeepingStore)
        (xorb,) = [file for file in (store.root / "xorbs").iterdir() if file.suffix != ".json"]
        return xorb.name, xorb.read_bytes(), store.shards[0]


def test_a_xorb_under_another_name_is_refused(tmp_path: Path, bodies: tuple[str, bytes, bytes]) -> None:
    name, xorb, _ = bodies
    store = XetStore(tmp_path)
    with pytest.raises(Refused, match=f"the content has the hash {name}"):
        store.put_xorb("0" * 64, xorb)
    assert store.put_xorb(name, xorb)
    assert not store.put_xorb(name, xorb)


def test_a_shard_is_refused_before_its_xorb_is_there(tmp_path: Path, bodies: tuple[str, bytes, bytes]) -> None:
    name, xorb, shard = bodies
    store = XetStore(tmp_path)
    with pytest.raises(Refused, match="was not uploaded"):
        store.put_shard(shard)
    store.put_xorb(name, xorb)
    assert store.put_shard(shard)
    assert not store.put_shard(shard)


# The shard: a header, the file, its one term, the term's check, the sha256, and so on, 48 bytes each.
@pytest.mark.parametrize(
    ("entry", "byte", "message"),
    [
        (1, 0, "has another hash"),
        (2, 0, "was not uploaded"),
        (2, 36, "has another size"),
        (2, 44, "chunks that xorb"),
        (3, 0, "not verified by its chunks"),
        (4, 0, "another sha256"),
        (7, 0, "other chunks"),
    ],
)
def test_a_shard_that_is_not_true_registers_nothing(
    tmp_path: Path, bodies: tuple[str, bytes, bytes], entry: int, byte: int, message: str
) -> None:
    name, xorb, shard = bodies
    store = XetStore(tmp_path)
    store.put_xorb(name, xorb)
    false = bytearray(shard)
    false[48 * entry + byte] ^= 0xFF
    with pytest.raises(Refused, match=message):
        store.put_shard(bytes(false))
    assert not list((tmp_path / "files").iterdir())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_body_is_refused_and_never_kept_as_another_content(
    tmp_path_factory: pytest.TempPathFactory, bodies: tuple[str, bytes, bytes], data: st.DataObject
) -> None:
    name, xorb, shard = bodies
    store = XetStore(tmp_path_factory.mktemp("damaged"))
    damaged = bytearray(xorb)
    damaged[data.draw(st.integers(0, len(xorb) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        store.put_xorb(name, bytes(damaged[: data.draw(st.integers(1, len(xorb)))]))
    except Refused:
        store.put_xorb(name, xorb)
    cut = shard[: data.draw(st.integers(0, len(shard) - 1))]
    with pytest.raises(Refused):
        store.put_shard(cut)
    store.put_shard(shard)
    (file,) = parse_shard(shard).files
    found = store.lookup(hashlib.sha256(CONTENT).hexdigest())
    assert found is not None and found[1] == len(CONTENT) == sum(term.size for term in file.terms)
    assert store.read(found[0]) == CONTENT


# The formats


# Keyed hashes of the official test vectors (github.com/BLAKE3-team/BLAKE3, test_vectors/test_vectors.json).
@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (0, "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26"),
        (1, "6d7878dfff2f485635d39013278ae14f1454b8c0a3a2d34bc1ab38228a80c95b"),
        (1024, "75c46f6f3d9eb4f55ecaaee480db732e6c2105546f1e675003687c31719c7ba4"),
        (3072, "044a0e7b172a312dc02a4c9a818c036ffa2776368d7f528268d2e6b5df191770"),
        (102400, "1c35d1a5811083fd7119f5d5d1ba027b4d01c0c6c49fb6ff2cf75393ea5db4a7"),
    ],
)
def test_keyed_hashes_are_blake3(size: int, digest: str) -> None:
    message = bytes(number % 251 for number in range(size))
    key = b"whats the Elvish word for friend"
    assert keyed_hashes(key, [message])[0].hex() == digest
    assert keyed_hashes(key, [b"before", message, bytes(5000)])[1].hex() == digest


@given(st.binary(max_size=200))
def test_bytes_that_are_no_frame_are_a_format_error(body: bytes) -> None:
    frame = bytes.fromhex("04224d18604082") + body  # the head of a frame, then anything
    with contextlib.suppress(FormatError):
        decode_lz4_frame(frame)
    for read in (decode_lz4_frame, parse_shard):
        with pytest.raises(FormatError):
            read(body)
