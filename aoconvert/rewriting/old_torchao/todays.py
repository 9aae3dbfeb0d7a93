"""Classes that torchao still has, or renamed, by a release that kept less of them than today's."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Symbol, Value
from aoconvert.formats.torch_bin.safe_names import ITEMSIZE, Kind, list_names
from aoconvert.humanize import with_article
from aoconvert.rewriting.migrate_types import CannotMigrate, Outcome, Read, SchemeName, dtype_of
from aoconvert.rewriting.old_torchao.activations import last_name
from aoconvert.rewriting.old_torchao.weight import per_row_or_group
from aoconvert.schemes.tensor_classes import class_named

_LIVE = (Kind.DATA, Kind.TUPLE, Kind.ENUM)
_INTX = ("IntxUnpackedTensor", "IntxUnpackedToInt8Tensor")


def is_todays(tensor: BinTensor) -> bool:
    """Whether a tensor has the class and the fields that torchao 0.18 gives it."""
    known = list_names().get(tensor.class_name)
    if known is None or known.legacy:
        return False
    fields = class_named(tensor.class_name).fields
    return not fields or {*tensor.inner, *tensor.attributes} >= set(fields[-1][2].split())


def todays(tensor: BinTensor, read: Read) -> Outcome | None:
    """What becomes of a tensor of such a class; ``None`` for any other class.

    Raises:
        CannotMigrate: it says something that no scheme of today does.
    """
    name = last_name(tensor.class_name)
    if name == "Int8Tensor":
        return _int8(tensor)
    if name == "Float8Tensor" and "qdata" in tensor.inner:
        return _float8(tensor)
    return _intx(tensor, read) if name in _INTX else None


def live(value: Value) -> Any:
    """A value of a tensor's attributes as torchao has it: granularities, settings, enums and dtypes, nothing else.

    Raises:
        CannotMigrate: torchao 0.18 does not register its class.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return tuple(live(item) for item in value)
    if isinstance(value, Symbol) and value.name.removeprefix("torch.") in ITEMSIZE:
        return getattr(torch, value.name.removeprefix("torch."))
    if isinstance(value, Instance):
        known = list_names().get(value.class_name)
        if known is not None and not known.legacy and known.kind in _LIVE:
            module, _, name = value.class_name.rpartition(".")
            made: Any = getattr(importlib.import_module(module), name)
            fields = {str(key): live(item) for key, item in value.state.items()}
            try:
                return made(*map(live, value.args), **fields)
            except (TypeError, ValueError) as error:
                raise CannotMigrate(f"its {name} has values that torchao does not know") from error
        raise CannotMigrate(
            f"it holds {with_article(last_name(value.class_name))}, which torchao does not have any more"
        )
    raise CannotMigrate("it holds a value that torchao does not have any more")


def _block(tensor: BinTensor) -> tuple[int, int]:
    found = tensor.attributes.get("block_size")
    if not (isinstance(found, tuple) and len(found) == len(tensor.shape) == 2):
        raise CannotMigrate(f"its scales are not for blocks of a matrix, but it has the shape {tensor.shape}")
    rows, columns = (int(size) if type(size) is int and size > 0 else length
                     for size, length in zip(found, tensor.shape, strict=True))  # fmt: skip
    if tensor.shape[0] % rows or tensor.shape[1] % columns:
        raise CannotMigrate(f"its blocks of {rows} x {columns} do not fill its shape {tensor.shape}")
    return rows, columns


def _part(tensor: BinTensor, name: str) -> BinTensor:
    found = tensor.inner.get(name)
    if found is None:
        raise CannotMigrate(f"its {last_name(tensor.class_name)} has no {name}")
    return found


def _plain_inner(tensor: BinTensor, *used: str) -> None:
    """Refuse what also holds tensors, or settings, that are not carried over here."""
    for name in (*tensor.inner, *tensor.attributes):
        if name.startswith("act_") and name not in used and (name in tensor.inner or tensor.attributes[name]):
            raise CannotMigrate(f"it also says what to do with activations ({name})")


def _int8(tensor: BinTensor) -> Outcome:
    _plain_inner(tensor, "act_quant_kwargs")
    block, kwargs = _block(tensor), live(tensor.attributes.get("act_quant_kwargs"))
    data, scale, zero = _part(tensor, "qdata"), _part(tensor, "scale"), tensor.inner.get("zero_point")
    settings: dict[str, str] = {}
    group = None
    if block == tensor.shape:
        settings["granularity"] = "per_tensor"
    else:
        group = per_row_or_group(block, tensor.shape)
    if kwargs is not None:
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        if not isinstance(kwargs, QuantizeTensorToInt8Kwargs):
            raise CannotMigrate("its settings for activations are not those of int8")
        if group is not None:
            raise CannotMigrate(f"int8 activations beside groups of {group}")
        if kwargs.mapping_type is MappingType.ASYMMETRIC:
            settings["act_mapping_type"] = "asymmetric"

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization import Int8Tensor

        scales = read(scale)
        made: torch.Tensor = Int8Tensor(
            qdata=read(data),
            scale=scales,
            block_size=list(block),
            dtype=dtype_of(tensor),
            zero_point=torch.zeros_like(scales, dtype=torch.int8) if zero is None else read(zero),
            act_quant_kwargs=kwargs,
            reduce_range=bool(tensor.attributes.get("reduce_range")),
        )
        return made

    return Outcome(make, SchemeName("int8wo" if kwargs is None else "int8dq", group, settings))


def _float8(tensor: BinTensor) -> Outcome:
    block, kwargs = _block(tensor), live(tensor.attributes.get("act_quant_kwargs"))
    data, scale = _part(tensor, "qdata"), _part(tensor, "scale")
    per_tensor = block == tensor.shape
    if not per_tensor and per_row_or_group(block, tensor.shape) is not None:
        raise CannotMigrate(f"float8 in blocks of {block[0]} x {block[1]}")
    if kwargs is not None:
        from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

        if not isinstance(kwargs, QuantizeTensorToFloat8Kwargs):
            raise CannotMigrate("its settings for activations are not those of float8")
        name = SchemeName("float8dq" if per_tensor else "float8dq_row")
    else:
        settings = {"granularity": "per_tensor"} if per_tensor else {}
        name = SchemeName("float8wo_e5m2" if "e5m2" in data.dtype else "float8wo", settings=settings)
    mm_config, preference = live(tensor.attributes.get("mm_config")), live(tensor.attributes.get("kernel_preference"))

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization import Float8Tensor

        made: torch.Tensor = Float8Tensor(
            qdata=read(data),
            scale=read(scale),
            block_size=list(block),
            mm_config=mm_config,
            act_quant_kwargs=kwargs,
            **({} if preference is None else {"kernel_preference": preference}),
            dtype=dtype_of(tensor),
        )
        return made

    return Outcome(make, name)


def _intx(tensor: BinTensor, read: Read) -> Outcome:
    """``IntxUnpackedToInt8Tensor``, which was called ``IntxUnpackedTensor`` in 0.13."""
    block, dtype = _block(tensor), live(tensor.attributes.get("target_dtype"))
    data, scale, zero = (_part(tensor, name) for name in ("qdata", "scale", "zero_point"))
    group, bits = per_row_or_group(block, tensor.shape), str(dtype).removeprefix("torch.int")
    if bits not in map(str, range(1, 9)):
        raise CannotMigrate(f"its codes are {dtype}")
    found: Any = tensor.attributes.get("activation_quantization")
    asked = found.args[0] if isinstance(found, Instance) and found.args else found
    symmetric = not bool((read(zero) != 0).any())
    if asked is None:
        name = SchemeName(f"intx{bits}wo" if symmetric else f"uint{bits}wo", group)
    else:
        settings = {} if symmetric else {"weight_mapping_type": "asymmetric"}
        settings |= {"weight_granularity": "per_axis:0"} if group is None else {}
        name = SchemeName("int4dq" if bits == "4" else f"int8dq_int{bits}", group, settings)

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization import IntxUnpackedToInt8Tensor

        made: torch.Tensor = IntxUnpackedToInt8Tensor(
            qdata=read(data),
            scale=read(scale),
            zero_point=read(zero),
            target_dtype=dtype,
            block_size=block,
            dtype=dtype_of(tensor),
            activation_quantization=asked,
        )
        return made

    return Outcome(make, name)
