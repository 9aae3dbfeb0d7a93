"""The weights of a component that Quanto wrote: open, and described."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from aoconvert.errors import SourceError
from aoconvert.formats.base import Observe, open_file, read_bytes
from aoconvert.formats.digest import FileDigest
from aoconvert.formats.safetensors.header import DTYPES, header_of, label_of
from aoconvert.formats.torch_bin.contents import BinTensor, StoredData
from aoconvert.models import ModelPart, build_skeleton
from aoconvert.models.bounds import Held, check_config, limit_model
from aoconvert.rewriting.hashed_files import HashedFiles
from aoconvert.rewriting.migrate_types import CannotMigrate, Kind, OldTensor, dtype_of, read_meta
from aoconvert.rewriting.quanto.decide import BITS, QuantoTensors, collect, decide, dequantize, is_packed, is_quanto
from aoconvert.sources import Source

QMAP = "quanto_qmap.json"
_DTYPE = re.compile(r"q?(int|float)([0-9])\w*")
_NO_ACTIVATIONS = (
    "activations of {} were quantized with scales that were measured beforehand, for which torchao has no class: they "
    "are computed in full precision now"
)


class QuantoFile:
    """A safetensors file, whose tensors are described as those of a torch file are.

    Args:
        source: holds it.
        path: in the source.

    Attributes:
        tensors: by key, in the order of their data.
        observe: is told of what is read.

    Raises:
        SourceError: missing, damaged, or of a dtype that torch does not have.
    """

    def __init__(self, source: Source, path: str) -> None:
        header = header_of(source, path)
        self.path: Path = source.local(path)
        self.observe: Observe | None = None
        self.tensors: dict[str, BinTensor] = {}
        for name, entry in header.entries.items():
            if entry.dtype not in DTYPES:
                raise SourceError(f"{label_of(source, path)}: tensor {name!r}: unknown dtype {entry.dtype!r}")
            data = StoredData(name, entry.begin, entry.end - entry.begin, 0, _row_major(entry.shape))
            dtype = DTYPES[entry.dtype][0]
            self.tensors[name] = BinTensor("torch.Tensor", dtype, entry.shape, data, {}, {}, False, "cpu")
        self._descriptor = open_file(self.path)

    def read(self, tensor: BinTensor) -> torch.Tensor:
        """The elements of a plain tensor, in memory of their own.

        Raises:
            ReadError: the disk fails, or the file changed.
        """
        data = tensor.data
        if data is None or data.offset is None:
            raise TypeError(f"a {tensor.class_name} has no elements of its own")
        raw = read_bytes(self._descriptor, data.offset, data.nbytes, str(self.path), observe=self.observe)
        return raw.view(dtype_of(tensor)).reshape(tensor.shape)

    def close(self) -> None:
        """Release the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(torch.Size(shape[at + 1 :]).numel()) for at in range(len(shape)))


@dataclass
class QuantoWeights(HashedFiles[QuantoFile]):
    """See :class:`aoconvert.rewriting.migrate_types.OldWeights`.

    Args:
        source: holds the files.
        component: the model, whose class tells the shapes of packed weights.
        paths: of the files, relative to the source.
        exact: dequantize what torchao's classes would round.
    """

    source: Source
    component: ModelPart
    paths: Sequence[str]
    exact: bool = False
    kind: Kind = "quanto"
    scheme: str | None = None
    written_by: str | None = None
    tensors: tuple[OldTensor, ...] = ()
    others: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    is_todays: bool = False
    _files: dict[str, QuantoFile] = field(default_factory=dict)
    _where: dict[str, str] = field(default_factory=dict)
    _digests: dict[str, FileDigest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            for path in self.paths:
                self._files[path] = QuantoFile(self.source, path)
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        stored: dict[str, BinTensor] = {}
        for path, file in self._files.items():
            for name, tensor in file.tensors.items():
                if name in stored:
                    raise SourceError(
                        f"{self.source.label}: tensor {name!r} is in both {self._where[name]} and {path}",
                        hint="remove the file that does not belong to the checkpoint",
                    )
                stored[name], self._where[name] = tensor, path
        qmap = _read_qmap(self.source, self.component.folder)
        shapes = _shapes(self.component, stored) if is_packed(stored) else {}
        found = collect(stored, shapes, _bits(stored, qmap, self.component.config))
        self.problems += found.problems
        self.others |= found.left_out
        tensors = []
        sizes: dict[str, int] = {}
        for name, tensor in found.tensors.items():
            path = self._path(tensor)
            if tensor.data is not None:
                tensors.append(_plain(name, tensor, path, self._files[path]))
                continue
            try:
                old = self._quantized(name, tensor, path)
            except CannotMigrate as error:
                self.problems.append(f"{name}: {error}" + (f" ({error.hint})" if error.hint else ""))
                continue
            scheme = _scheme(tensor)
            sizes[scheme] = sizes.get(scheme, 0) + tensor.nbytes
            tensors.append(old)
        self.tensors = tuple(tensors)
        self.scheme = "+".join(sorted(sizes, key=lambda scheme: -sizes[scheme])) or None
        if active := self._activations(found, qmap):
            self.warnings.append(_NO_ACTIVATIONS.format(f"{active} layers" if active > 1 else "1 layer"))

    def _path(self, tensor: BinTensor) -> str:
        """The file that holds a tensor, or its codes."""
        plain = next(leaf for _, leaf in tensor.leaves())
        assert plain.data is not None
        return self._where[plain.data.storage]

    def _quantized(self, name: str, tensor: BinTensor, path: str) -> OldTensor:
        outcome = decide(tensor, self._read, exact=self.exact)
        rounded = tensor.class_name == BITS and outcome.is_carried

        def make(on_meta: bool) -> torch.Tensor:
            return outcome.make(read_meta if on_meta else self._read)

        return OldTensor(
            name=name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            stored_dtype=tensor.inner["data"].dtype,
            bytes_in=tensor.nbytes,
            file=path,
            make=make,
            was_quantized=True,
            scheme=outcome.scheme,
            reason=outcome.reason,
            exact=partial(dequantize, tensor, self._read) if rounded else None,
        )

    def _read(self, tensor: BinTensor) -> torch.Tensor:
        """From the file that holds it: the parts of a weight may be in two shards."""
        return self._files[self._path(tensor)].read(tensor)

    def _activations(self, found: QuantoTensors, qmap: Mapping[str, Mapping[str, str]]) -> int:
        """How many layers quantized their activations: by the map, or by a scale other than the 1 of none."""
        layers = {name for name, entry in qmap.items() if entry.get("activations", "none") != "none"}
        for file in self._files.values():
            for name in found.left_out:
                if name in file.tensors and float(file.read(file.tensors[name])) != 1:
                    layers.add(name.rpartition(".")[0])
        return len(layers)


def holds_quanto(source: Source, paths: Sequence[str]) -> bool:
    """Whether safetensors hold weights of Quanto."""
    return any(is_quanto(header_of(source, path).entries) for path in paths)


def _plain(name: str, tensor: BinTensor, path: str, file: QuantoFile) -> OldTensor:
    def make(on_meta: bool) -> torch.Tensor:
        return read_meta(tensor) if on_meta else file.read(tensor)

    return OldTensor(name, tensor.shape, tensor.dtype, tensor.dtype, tensor.nbytes, path, make)


def _shapes(component: ModelPart, stored: Mapping[str, BinTensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's tensors, by its class."""
    config = {name: value for name, value in component.config.items() if name != "quantization_config"}
    held = Held.of(tensor.nbytes for tensor in stored.values())
    check_config(component.title, config, held)
    with limit_model(component.title, held):
        skeleton = build_skeleton(replace(component, config=config), torch.bfloat16)
    return {spec.name: spec.shape for spec in skeleton}


def _read_qmap(source: Source, folder: str) -> dict[str, dict[str, str]]:
    """Module → what its weights and activations are; empty without a map.

    Raises:
        SourceError: it is there and is not such a table.
    """
    path = posixpath.join(folder, QMAP)
    if not source.has(path):
        return {}
    found = source.read_json(path)
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise SourceError(f"{source.label}: {path} is not a table of modules", hint="download the checkpoint again")
    return {name: {str(key): str(value) for key, value in entry.items()} for name, entry in found.items()}


def _bits(
    stored: Mapping[str, BinTensor], qmap: Mapping[str, Mapping[str, str]], config: Mapping[str, object]
) -> dict[str, int]:
    """Bits of a value by the weight, where the map or the config say it."""
    quantization = config.get("quantization_config")
    usual = quantization.get("weights_dtype") if isinstance(quantization, Mapping) else None
    found = {}
    for name in stored:
        base = name.removesuffix("._data._data")
        said = qmap.get(base.removesuffix(".weight"), {}).get("weights", usual)
        match = _DTYPE.fullmatch(said) if isinstance(said, str) else None
        if base != name and match is not None:
            found[base] = int(match[2])
    return found


def _scheme(tensor: BinTensor) -> str:
    """As ``inspect`` calls it."""
    if tensor.class_name != BITS:
        return f"quanto_{tensor.inner['data'].dtype.removesuffix('fn')}"
    rows, packed = tensor.inner["scale"].shape[0], tensor.inner["data"].shape[0]
    return "quanto_int2" if rows > 2 * packed else "quanto_int4"
