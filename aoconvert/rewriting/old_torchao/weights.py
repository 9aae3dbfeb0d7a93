"""The weights of a component that torchao wrote, any release from 0.4 on: open, and described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from aoconvert.errors import AoconvertError
from aoconvert.formats.digest import FileDigest
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.inspection.compat import find_written, short
from aoconvert.inspection.release_names import RELEASES
from aoconvert.inspection.scheme import scheme_of
from aoconvert.rewriting.hashed_files import HashedFiles
from aoconvert.rewriting.migrate_types import CannotMigrate, Kind, OldTensor, read_meta
from aoconvert.rewriting.old_file import OldFile, place_of
from aoconvert.rewriting.old_torchao.activations import last_name
from aoconvert.rewriting.old_torchao.decide import decide
from aoconvert.rewriting.old_torchao.todays import is_todays
from aoconvert.sources import Source

BROKEN = "torchao 0.8 and 0.9 wrote broken int4 weights for the CPU where HQQ was on: compare the outputs"


@dataclass
class TorchaoWeights(HashedFiles[OldFile]):
    """See :class:`aoconvert.rewriting.migrate_types.OldWeights`.

    Args:
        source: holds the files.
        paths: of the files, relative to the source.
        packed_on: as of ``decide``.
    """

    source: Source
    paths: Sequence[str]
    packed_on: str | None = None
    kind: Kind = "torchao"
    scheme: str | None = None
    written_by: str | None = None
    tensors: tuple[OldTensor, ...] = ()
    others: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    is_todays: bool = True
    _files: dict[str, OldFile] = field(default_factory=dict)
    _digests: dict[str, FileDigest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            for path in self.paths:
                self._files[path] = OldFile(self.source.local(path))
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        found: list[OldTensor] = []
        schemes: dict[str, int] = {}
        entries: list[BinTensor] = []
        for path, file in self._files.items():
            for name in sorted(file.tensors, key=lambda name, held=file.tensors: place_of(held[name])):  # type: ignore[misc]
                tensor = file.tensors[name]
                if tensor.data is not None:
                    found.append(_plain(name, tensor, path, file))
                    continue
                entries.append(tensor)
                self.is_todays = self.is_todays and is_todays(tensor)
                scheme = scheme_of(tensor) or last_name(tensor.class_name)
                schemes[scheme] = schemes.get(scheme, 0) + tensor.nbytes
                try:
                    found.append(self._quantized(name, tensor, path, file))
                except CannotMigrate as error:
                    hint = f" ({error.hint})" if error.hint else ""
                    self.problems.append(f"{name}: {error}{hint}")
            self.is_todays = self.is_todays and file.contents.archive and not file.contents.legacy
            self.others |= dict.fromkeys(file.others, "not a tensor")
        self.tensors = tuple(found)
        self.scheme = "+".join(sorted(schemes, key=lambda scheme: -schemes[scheme])) or None
        names = {use.name for file in self._files.values() for use in file.contents.globals}
        span = find_written(names, entries)
        if span is not None:
            first, last = short(span[0]), short(span[1])
            self.written_by = f"torchao {first}" if first == last else f"torchao {first} to {last}"
        broken = span is not None and span[0] <= RELEASES.index("0.9.0") and span[1] >= RELEASES.index("0.8.0")
        if broken and any("Int4CPU" in name for name in names):
            self.warnings.append(BROKEN)

    def _quantized(self, name: str, tensor: BinTensor, path: str, file: OldFile) -> OldTensor:
        outcome = decide(tensor, file.read, self.packed_on)

        def make(on_meta: bool) -> torch.Tensor:
            return outcome.make(read_meta if on_meta else file.read)

        leaves = [leaf for _, leaf in tensor.leaves()]
        return OldTensor(
            name=name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            stored_dtype=max(leaves, key=lambda leaf: leaf.nbytes).dtype,
            bytes_in=tensor.nbytes,
            file=path,
            make=make,
            was_quantized=True,
            scheme=outcome.scheme,
            reason=outcome.reason,
            packing=outcome.packing,
            unconfirmed=outcome.unconfirmed,
            place=tensor.place,
        )


def _plain(name: str, tensor: BinTensor, path: str, file: OldFile) -> OldTensor:
    read = partial(_read, file, tensor)
    return OldTensor(name, tensor.shape, tensor.dtype, tensor.dtype, tensor.nbytes, path, read, place=tensor.place)


def _read(file: OldFile, tensor: BinTensor, on_meta: bool) -> torch.Tensor:
    return read_meta(tensor) if on_meta else file.read(tensor)


def holds_torchao(source: Source, paths: Sequence[str]) -> bool:
    """Whether torch files hold tensors of torchao; a file that cannot be read is for others to refuse."""
    try:
        for path in paths:
            with OldFile(source.local(path)) as file:
                if any(use.name.startswith("torchao.") for use in file.contents.globals):
                    return True
    except AoconvertError:
        return False
    return False
