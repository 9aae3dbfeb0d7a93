"""The hashes of the Xet protocol: BLAKE3 keyed hashes of chunks, and the Merkle trees over them.

Sources: the BLAKE3 paper (github.com/BLAKE3-team/BLAKE3-specs) for the compression function, the chunk chaining and the
tree; "Hashing" of the Xet protocol specification (huggingface.co/docs/xet/hashing) for the keys and for the tree of
chunk hashes; "Converting Hashes to Strings" there (docs/xet/api) for the hex form. hashlib has no BLAKE3. One Xet
upload hashes many chunks, so all of them go through the compression function together, one numpy column each.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

# Published constants of the Xet protocol: leaves, inner nodes, the term check; the file hash has no salt.
CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
TERM_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")
FILE_KEY = bytes(32)
NO_HASH = bytes(32)

_IV = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32
)
_PERMUTATION = np.array([2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8])
_CHUNK_START, _CHUNK_END, _PARENT, _ROOT, _KEYED = 1, 2, 4, 8, 16
_LEAF = 1024  # bytes of a BLAKE3 chunk, not of a Xet chunk


def to_hex(digest: bytes) -> str:
    """The hex form of a 32-byte hash: four little-endian 64-bit numbers, each 16 digits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def chunk_hashes(chunks: Sequence[bytes]) -> list[bytes]:
    return keyed_hashes(CHUNK_KEY, chunks)


def term_hash(hashes: Sequence[bytes]) -> bytes:
    """What a shard states about the chunks of one term, so that only someone who has them can name them."""
    return keyed_hashes(TERM_KEY, [b"".join(hashes)])[0]


def file_hash(nodes: Sequence[tuple[bytes, int]]) -> bytes:
    """The hash of a file from its chunks' hashes and sizes; zeros for an empty file."""
    return keyed_hashes(FILE_KEY, [merkle_root(nodes)])[0] if nodes else NO_HASH


def merkle_root(nodes: Sequence[tuple[bytes, int]]) -> bytes:
    """The hash of a xorb from its chunks' hashes and sizes in bytes.

    A level is cut after every hash that 4 divides, into groups of 3 to 9 (at the end of a level also fewer); a group's
    parent is the hash of the text lines ``hash : size``.
    """
    level = list(nodes)
    while len(level) > 1:
        groups = []
        while level:
            end = next((i + 1 for i in range(2, min(9, len(level))) if level[i][0][24] % 4 == 0), 9)
            groups.append(level[:end])
            level = level[end:]
        texts = ["".join(f"{to_hex(digest)} : {size}\n" for digest, size in group).encode() for group in groups]
        sizes = [sum(size for _, size in group) for group in groups]
        level = list(zip(keyed_hashes(NODE_KEY, texts), sizes, strict=True))
    return level[0][0] if level else NO_HASH


def keyed_hashes(key: bytes, messages: Sequence[bytes]) -> list[bytes]:
    """BLAKE3 keyed hashes, 32 bytes each."""
    if not messages:
        return []
    words = np.frombuffer(key, "<u4").astype(np.uint32)
    counts = [max(1, -(-len(message) // _LEAF)) for message in messages]
    nodes = np.split(_leaves(words, messages, counts).T, np.cumsum(counts)[:-1])
    while any(len(node) > 1 for node in nodes):
        # Pairs of one level; an odd last node moves up as it is, which gives BLAKE3's left-full tree.
        halves = [len(node) // 2 for node in nodes]
        pairs = np.concatenate([node[: 2 * half].reshape(-1, 16) for node, half in zip(nodes, halves, strict=True)])
        flags = np.repeat([_PARENT | _KEYED | (_ROOT if len(node) == 2 else 0) for node in nodes], halves)
        zeros = np.zeros(len(pairs), np.uint64)
        parents = _compress(np.repeat(words[:, None], len(pairs), 1), pairs.T, zeros, zeros + np.uint64(64), flags).T
        merged = np.split(parents, np.cumsum(halves)[:-1])
        nodes = [np.concatenate([new, old[2 * len(new) :]]) for new, old in zip(merged, nodes, strict=True)]
    return [node[0].astype("<u4").tobytes() for node in nodes]


def _leaves(key: Words, messages: Sequence[bytes], counts: Sequence[int]) -> Words:
    """Chaining values of all 1024-byte pieces of all messages, one column each."""
    total = sum(counts)
    padded = b"".join(message.ljust(count * _LEAF, b"\0") for message, count in zip(messages, counts, strict=True))
    blocks = np.frombuffer(padded, "<u4").reshape(total, 16, 16).astype(np.uint32)
    lengths = np.full(total, _LEAF)
    ends = np.cumsum(counts) - 1
    lengths[ends] = [len(message) - (count - 1) * _LEAF for message, count in zip(messages, counts, strict=True)]
    numbers = np.concatenate([np.arange(count, dtype=np.uint64) for count in counts])
    alone = np.repeat(np.array(counts) == 1, counts)
    needed = np.maximum(1, -(-lengths // 64))
    values = np.repeat(key[:, None], total, 1)
    for index in range(int(needed.max())):
        live = np.flatnonzero(needed > index)
        last = needed[live] == index + 1
        flags = _KEYED | (_CHUNK_START if index == 0 else 0) | last * _CHUNK_END | (last & alone[live]) * _ROOT
        length = np.where(last, lengths[live] - 64 * index, 64)
        values[:, live] = _compress(values[:, live], blocks[live, index].T, numbers[live], length, flags)
    return values


def _compress(
    values: Words, block: Words, number: npt.NDArray[np.uint64], length: npt.NDArray[Any], flags: npt.NDArray[Any]
) -> Words:
    """The compression function on n columns: 8 chaining words, 16 message words; returns the next 8 words."""
    n = values.shape[1]
    a, b = values[:4], values[4:]
    c = np.repeat(_IV[:4, None], n, 1)
    low, high = number & np.uint64(0xFFFFFFFF), number >> np.uint64(32)
    d = np.stack([low, high, length, flags]).astype(np.uint32)
    order = np.arange(16)
    for _ in range(7):
        a, b, c, d = _mix(a, b, c, d, block[order[0:8:2]], block[order[1:8:2]])
        b, c, d = np.roll(b, -1, 0), np.roll(c, -2, 0), np.roll(d, -3, 0)
        a, b, c, d = _mix(a, b, c, d, block[order[8:16:2]], block[order[9:16:2]])
        b, c, d = np.roll(b, 1, 0), np.roll(c, 2, 0), np.roll(d, 3, 0)
        order = order[_PERMUTATION]
    return np.concatenate([a ^ c, b ^ d])


def _mix(a: Words, b: Words, c: Words, d: Words, x: Words, y: Words) -> tuple[Words, Words, Words, Words]:
    a = a + b + x
    d = _rotate(d ^ a, 16)
    c = c + d
    b = _rotate(b ^ c, 12)
    a = a + b + y
    d = _rotate(d ^ a, 8)
    c = c + d
    return a, _rotate(b ^ c, 7), c, d


def _rotate(words: Words, bits: int) -> Words:
    return (words >> np.uint32(bits)) | (words << np.uint32(32 - bits))
