"""torch files from before 1.6, which are no zip archives, read without executing them.

Five pickles stand one after the other: a magic number, the protocol, sizes of C types, the dict, the keys of the
storages. The storages follow in the order of the keys, each behind the number of its elements (64 bits). Source:
``_legacy_save`` and ``_legacy_load`` in ``torch/serialization.py``. ``torch.save`` still writes such files with
``_use_new_zipfile_serialization=False``.

How large the storages are is said in the dict, and where they lie only after it: so the dict is read twice. Every byte
of the file must belong to a pickle or to a storage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from aoconvert.errors import UnsafePickleError, UnsafeZipError
from aoconvert.formats.torch_bin.contents import Value
from aoconvert.formats.torch_bin.pickle_reader import MAX_PICKLE_BYTES, read_first_pickle
from aoconvert.formats.torch_bin.pickle_vm import Actions, PickledItems, refuse
from aoconvert.formats.torch_bin.rebuild import Name, Rebuilder
from aoconvert.formats.torch_bin.safe_names import ITEMSIZE, STORAGE_DTYPE, Kind
from aoconvert.formats.torch_bin.zip_reader import Record
from aoconvert.sources.byte_source import ByteSource

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
# as the protocols 2 to 5 pickle it; from 4 on a frame of so many bytes is around it
_HEAD = re.compile(rb"\x80[\x02-\x05](?:\x95\x0d\x00{7})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.")
_PROTOCOL = 1001  # torch.serialization.PROTOCOL_VERSION
_HEADS = 3  # pickles before the dict
_FIRST_READ = 1 << 20
_MORE = 8  # times as much is read, until the pickles are whole
_COUNT = 8  # bytes before a storage
_DAMAGED = "the copy or download may have been cut short: fetch the file again"


@dataclass(frozen=True)
class OldFile:
    """What stands before the storages, and where these lie.

    Attributes:
        pickle: of the dict.
        records: the storages, by key.
        byteorder: ``little`` or ``big``.
    """

    pickle: bytes
    records: Mapping[str, Record]
    byteorder: str


def is_old(source: ByteSource) -> bool:
    """Whether a file begins with the magic number, pickled by any protocol."""
    return _HEAD.match(source.read(0, min(source.size, 32))) is not None


def read_old(source: ByteSource, *, counts: bool = True) -> OldFile:
    """Find the pickle of the dict, and the storages.

    Args:
        source: the file.
        counts: also read the number before every storage, and compare it. Of a remote file each costs a request.

    Raises:
        UnsafePickleError: a pickle holds what no checkpoint needs.
        UnsafeZipError: damaged, or not as torch wrote it.
        SourceError: the bytes could not be read.
    """
    amount = min(source.size, _FIRST_READ)
    while True:
        data = source.read(0, amount)
        try:
            start, byteorder = _read_heads(data)
            sizes, keys, end, storages = _read_dict(data[start:])
            break
        except UnsafePickleError:
            if amount >= min(source.size, MAX_PICKLE_BYTES):
                raise
            amount = min(source.size, MAX_PICKLE_BYTES, amount * _MORE)
    records = {record.name: record for record in _place(source, sizes, keys, start + storages, counts=counts)}
    return OldFile(data[start : start + end], records, byteorder)


class OldRebuilder(Rebuilder):
    """The ``Actions`` of the dict: a persistent id has one item more, for a kind of view that torch 0.3 had.

    Args:
        records: storages by key; ``None`` where they are not known yet: then the sizes that are said are taken down.
        pickle_bytes, expanded: as for ``Rebuilder``.
    """

    def __init__(self, records: Mapping[str, Record] | None, pickle_bytes: int, *, expanded: bool = False) -> None:
        self._said: dict[str, Record] = {}
        self._takes_down = records is None
        self.widths: dict[str, int] = {}
        super().__init__(self._said if records is None else records, pickle_bytes, expanded=expanded)

    @property
    def said(self) -> Mapping[str, Record]:
        """The storages that the dict names, without their places."""
        return self._said

    def persistent(self, pid: object, position: int) -> object:
        """A storage of the size that the id says."""
        match pid:
            case ("storage", Name() as kind, str(key), str(), int(numel), None) if kind.kind is Kind.STORAGE:
                width = ITEMSIZE[STORAGE_DTYPE[kind.dotted]]
                if self._takes_down and key not in self._said and 0 <= numel < 1 << 62:
                    self._said[key] = Record(key, 0, None, numel * width, 0, 0, 0)
                    self.widths[key] = width
                return super().persistent(pid[:5], position)
        raise refuse(position, "a persistent id that is not a storage")


def _read_heads(data: bytes) -> tuple[int, str]:
    """Where the dict's pickle begins, and the byte order."""
    found: list[Value] = []
    start = 0
    for _ in range(_HEADS):
        rebuilder = Rebuilder({}, 0)
        value, _, end = read_first_pickle(data[start : start + 4096], rebuilder)
        found.append(rebuilder.freeze(value, start))
        start += end
    magic, protocol, facts = found
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or not isinstance(facts, Mapping):
        raise refuse(None, "does not begin as torch's files from before 1.6 do")
    return start, "little" if facts.get("little_endian") is True else "big"


def _read_dict(data: bytes) -> tuple[OldRebuilder, list[str], int, int]:
    """The storages that the dict names, their keys in the order of the file, the ends of the dict and of the keys."""
    rebuilder = OldRebuilder(None, len(data), expanded=True)
    _, _, end = read_first_pickle(data, rebuilder)
    rest: Actions = Rebuilder({}, len(data))
    keys, _, more = read_first_pickle(data[end:], rest)
    values = keys.values if isinstance(keys, PickledItems) else [None]
    if not all(isinstance(key, str) for key in values) or len(set(values)) != len(values):
        raise refuse(end, "the keys of the storages are not a list of different strings")
    return rebuilder, [str(key) for key in values], end, end + more


def _place(source: ByteSource, sizes: OldRebuilder, keys: list[str], start: int, *, counts: bool) -> Iterator[Record]:
    """The storages with their places, which fill the rest of the file."""
    if set(keys) != set(sizes.said):
        raise UnsafeZipError("its list of storages does not name those of its tensors", hint=_DAMAGED)
    total = sum(_COUNT + record.size for record in sizes.said.values())
    if start + total != source.size:
        raise UnsafeZipError(f"{source.size:,} bytes, {start + total:,} by what it says of itself", hint=_DAMAGED)
    for key in keys:
        size, width = sizes.said[key].size, sizes.widths[key]
        if counts and (count := int.from_bytes(source.read(start, _COUNT), "little")) * width != size:
            raise UnsafeZipError(f"storage {key} has {count:,} elements, {size // width:,} in the pickle")
        yield Record(key, start, start + _COUNT, size, 0, 0, start + _COUNT + size)
        start += _COUNT + size
