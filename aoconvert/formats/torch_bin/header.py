"""What a ``.bin`` holds, and whether it may be loaded: from its zip directory and ``data.pkl`` alone.

A file from before torch 1.6 is no zip archive: :mod:`aoconvert.formats.torch_bin.old_reader`.

No storage is read, nothing is executed, torch and torchao are not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from aoconvert.errors import UnsafeFileError, UnsafePickleError, UnsafeZipError
from aoconvert.formats.torch_bin.contents import BinContents, BinTensor, StorageInfo, Value
from aoconvert.formats.torch_bin.old_reader import OldRebuilder, is_old, read_old
from aoconvert.formats.torch_bin.pickle_reader import MAX_PICKLE_BYTES, read_pickle
from aoconvert.formats.torch_bin.pickle_vm import PickledPairs, refuse
from aoconvert.formats.torch_bin.rebuild import Rebuilder
from aoconvert.formats.torch_bin.zip_reader import Record, read_archive, read_record
from aoconvert.sources.byte_source import ByteSource, LocalFile

MAX_REPEATS = 16  # times that the bytes of a file may be read, beyond what costs little
_FREE_BYTES = 256 << 20

_Error = TypeVar("_Error", bound=UnsafeFileError)


def read_bin(path: Path) -> BinContents:
    """Read and check a ``.bin`` on this machine. Old torchao's files are read too, see ``BinContents.legacy``.

    Raises:
        SourceError: missing or unreadable.
        UnsafeZipError: not an archive as torch writes them.
        UnsafePickleError: its pickle names, calls or refers to something that no checkpoint needs.
    """
    with LocalFile(path) as source:
        return read_source(source, str(path))


def read_source(source: ByteSource, label: str, *, local_headers: bool = True, expanded: bool = False) -> BinContents:
    """``read_bin`` from any source of bytes.

    Args:
        source: the file.
        label: what messages call it.
        local_headers: see ``read_archive``; without them storages and tensors have no ``offset``.
        expanded: accept tensors that repeat their elements, which no quantized checkpoint holds.

    Raises:
        SourceError: the bytes could not be read.
        UnsafeZipError, UnsafePickleError: as ``read_bin``.
    """
    old = is_old(source)
    try:
        if old:
            return _read_old(source, local_headers=local_headers, expanded=expanded)
        archive = read_archive(source, local_headers=local_headers)
        order = read_record(source, archive, "byteorder", 16) if "byteorder" in archive.records else b"little"
        if order not in (b"little", b"big"):
            raise refuse(None, "the byte order beside it is neither little nor big")
        data = read_record(source, archive, "data.pkl", MAX_PICKLE_BYTES)
        return read_contents(data, archive.storages(), order.decode(), expanded=expanded)
    except UnsafeFileError as error:
        raise _label(error, label, old) from None


def read_contents(
    data: bytes, storages: Mapping[str, Record], byteorder: str = "little", *, expanded: bool = False
) -> BinContents:
    """Read a ``data.pkl`` over the storage records beside it, by key.

    Raises:
        UnsafePickleError: as ``read_bin``.
    """
    return _read_dict(data, Rebuilder(storages, len(data), expanded=expanded), byteorder)


def _read_old(source: ByteSource, *, local_headers: bool, expanded: bool) -> BinContents:
    old = read_old(source, counts=local_headers)
    rebuilder = OldRebuilder(old.records, len(old.pickle), expanded=expanded)
    return replace(_read_dict(old.pickle, rebuilder, old.byteorder), archive=False)


def _read_dict(data: bytes, rebuilder: Rebuilder, byteorder: str) -> BinContents:
    top, protocol = read_pickle(data, rebuilder)
    if not isinstance(top, PickledPairs):
        raise refuse(None, "it does not hold a dict", hint="a checkpoint is a dict of tensors by name")
    tensors: dict[str, BinTensor] = {}
    others: dict[str | int, Value] = {}
    frozen = rebuilder.freeze(top, len(data) - 1)
    if not isinstance(frozen, dict):
        raise TypeError(f"a dict froze to a {type(frozen).__name__}")
    for name, value in frozen.items():
        if isinstance(name, str) and isinstance(value, BinTensor):
            tensors[name] = value
        else:
            others[name] = value
    check_reads(tensors.values(), rebuilder.storages)
    return BinContents(
        tensors=tensors,
        others=others,
        globals=tuple(sorted(rebuilder.uses.values(), key=lambda use: use.name)),
        storages=rebuilder.storages,
        protocol=protocol,
        byteorder=byteorder,
    )


def check_reads(tensors: Iterable[BinTensor], storages: Mapping[str, StorageInfo]) -> None:
    """Refuse a file of which much more would be read than it holds; the same tensor under many names is read once.

    Raises:
        UnsafePickleError: it is such a file.
    """
    held = sum(info.size for info in storages.values())
    wanted = sum({tensor.place: tensor.nbytes for tensor in tensors}.values())
    if wanted > _FREE_BYTES + MAX_REPEATS * held:
        raise refuse(None, f"its tensors take {wanted:,} bytes out of storages that hold {held:,}")


def read_loadable(path: Path) -> BinContents:
    """``read_bin`` of a file that today's torch and torchao load, running nothing but their own rebuilding of tensors.

    Raises:
        SourceError, UnsafeZipError, UnsafePickleError: as ``read_bin``; also for a file that is no zip archive, which
            cannot be mapped, and for names of an older torchao, which are
            harmless but cannot be loaded.
    """
    contents = read_bin(path)
    if not contents.archive:
        raise UnsafeZipError(
            f"{path}: written in torch's format from before 1.6, which cannot be mapped",
            hint="save it again with a newer torch, or use the safetensors file of the same model",
        )
    for use in contents.legacy:
        raise UnsafePickleError(
            f"{path}: data.pkl, byte {use.position}: {use.name} is from a torchao older than 0.18, and cannot be "
            f"loaded",
            hint="`aoconvert inspect` shows what the file contains and which torchao loads it",
            position=use.position,
        )
    return contents


def _label(error: _Error, label: str, old: bool) -> _Error:
    said = error.message.replace("data.pkl", "its pickle", 1) if old else error.message
    message = f"{label}: {said}"
    if isinstance(error, UnsafePickleError):
        return type(error)(message, hint=error.hint, position=error.position)
    return type(error)(message, hint=error.hint)
