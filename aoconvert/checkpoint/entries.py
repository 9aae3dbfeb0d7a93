"""What a manifest says of each tensor, in a form that bears hundreds of thousands of them.

An entry is a slotted dataclass, and what many of them have in common is there once: some 500 bytes each, where a
pydantic model takes 2.3 kB. pydantic validates them all the same.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema, core_schema

_T = TypeVar("_T", bound=Hashable)


def inside(path: str) -> str:
    """Refuse a path that could leave the folder, before anything is opened."""
    parts = PurePosixPath(path).parts
    if (
        not path
        or "\\" in path
        or "\0" in path
        or path.startswith("/")
        or ".." in parts
        or re.match(r"^[A-Za-z]:", path)
    ):
        raise ValueError(f"{path!r} is not a path inside the folder")
    return path


@lru_cache(maxsize=1 << 12)
def _one(value: _T) -> _T:
    """The first of all values that are equal to this one."""
    return value


_SHARED = AfterValidator(_one)

RelativePath = Annotated[str, AfterValidator(inside), Field(description="relative, '/'-separated, inside the folder")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Action = Literal["quantize", "cast", "keep", "tied", "carry"]
Migration = Literal["carried", "dequantized", "requantized"]
Kind = Literal["linear", "embedding", "experts", "other"]
_Text = Annotated[str, _SHARED]
_Texts = Annotated[tuple[_Text, ...], _SHARED]
_Shape = Annotated[tuple[int, ...], _SHARED]
_Count = Annotated[int, _SHARED]
_File = Annotated[RelativePath, _SHARED]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor. A subclass's ``__slots__`` are its keys, in order.

    ``unknown``: what a newer writer says of it, as JSON values; kept, and written again. ``only_if_set``: fields that
    are left out where they are ``None``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="allow")
    only_if_set: ClassVar[tuple[str, ...]] = ()

    unknown: Annotated[Mapping[str, Any] | None, SkipJsonSchema()] = None

    def to_dict(self) -> dict[str, Any]:
        """As it is written: by key, in the order of the fields."""
        found = {name: getattr(self, name) for name in self.__slots__}
        for name in self.only_if_set:
            if found[name] is None:
                del found[name]
        return found | dict(self.unknown or {})

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            cls._set_apart,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(Entry.to_dict),
        )

    @classmethod
    def _set_apart(cls, values: Any) -> Any:
        """Keys that are no field's."""
        if not isinstance(values, dict) or values.keys() <= (names := set(cls.__slots__)):
            return values
        known = {name: value for name, value in values.items() if name in names}
        return {**known, "unknown": {name: value for name, value in values.items() if name not in names}}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry(Entry):
    """One state-dict entry, as it was written.

    ``action`` is ``carry`` for a tensor that the model class does not know: its name and its bytes are the source's.
    ``sha256`` is over the bytes of the inner tensors in ``data_names`` order (a plain tensor: its own bytes).
    ``sqnr_db`` is 20·log10(‖w‖ / ‖w − dequantized‖), against the source's weight. ``scheme`` is what it was quantized
    to, ``kind`` what it belongs to. ``repaired_rows`` counts rows of zeros for which torchao gives no scale, so that
    they would become NaN, and which were given one. ``device``: the type of device that quantized it, or a part of it,
    where that is not ``environment.device``: a GPU had no memory for it, or torchao does it on a CPU only.
    ``migration``: what ``migrate`` did with a tensor that was quantized before: ``carried`` (the same codes and
    scales), ``dequantized`` or ``requantized``; absent for any other tensor.
    """

    only_if_set: ClassVar[tuple[str, ...]] = ("migration",)

    name: str
    shape: _Shape
    dtype: _Text
    action: Annotated[Action, _SHARED]
    reason: _Text | None = None
    scheme: _Text | None = None
    kind: Annotated[Kind, _SHARED] | None = None
    class_name: _Text
    data_names: _Texts = field(default_factory=tuple)
    bytes_in: _Count
    bytes_out: _Count
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    repaired_rows: Annotated[int, Field(ge=0)] = 0
    device: _Text | None = None
    migration: Annotated[Migration, _SHARED] | None = None
    file: _File | None = None
    sha256: Sha256 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEntry(Entry):
    """A tensor that is as it was in the source. ``sha256`` is of its elements in row-major order."""

    name: str
    dtype: _Text
    shape: _Shape
    sha256: Sha256
    file: _File
