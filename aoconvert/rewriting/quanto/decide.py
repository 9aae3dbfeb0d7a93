"""What becomes of a weight by Quanto, and what its values are.

A Quanto checkpoint is safetensors of plain tensors: ``W.weight._data`` and ``_scale`` of a weight of 8 bits,
``W.weight._data._data`` (packed), ``_scale`` and ``_shift`` of one of 4 or 2; ``W.input_scale`` and ``W.output_scale``
are for activations. Sources: optimum-quanto 0.2.7, ``tensor/weights/qbytes.py``, ``tensor/weights/qbits.py``,
``tensor/packed.py`` (value i of a byte is row ``i·R + r``, the low bits first), ``tensor/grouped.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from aoconvert.environment import import_torchao
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.rewriting.migrate_types import CannotMigrate, Outcome, Read, SchemeName, dtype_of

BYTES = "optimum.quanto.WeightQBytesTensor"
BITS = "optimum.quanto.WeightQBitsTensor"
_FLOAT8 = {"float8_e4m3fn": "float8wo", "float8_e5m2": "float8wo_e5m2"}
_ACTIVATIONS = ("input_scale", "output_scale")
_AGAIN = "quantize the original again"
_COPY = "download the checkpoint again: part of it is missing"
_LOST = "{} of its scales were 0: what they stand for are zeros by a scale of 1 now"
_ROUNDED = "its codes and scales are the same; its zero points, kept as values by Quanto, are rounded"


@dataclass(frozen=True)
class QuantoTensors:
    """What a Quanto file holds.

    Attributes:
        tensors: by the model's names; a quantized one is of :data:`BYTES` or :data:`BITS`, with its parts in ``inner``.
        left_out: what no class of today has a place for: name → why.
        problems: weights that are not whole, one line each.
    """

    tensors: Mapping[str, BinTensor] = field(repr=False)
    left_out: Mapping[str, str]
    problems: tuple[str, ...] = ()


def is_quanto(names: Iterable[str]) -> bool:
    """Whether keys of a file are those of Quanto."""
    return any(name.endswith(("weight._data", "weight._data._data")) for name in names)


def collect(
    stored: Mapping[str, BinTensor], shapes: Mapping[str, tuple[int, ...]], bits: Mapping[str, int] | None = None
) -> QuantoTensors:
    """Put the parts of weights together.

    Args:
        stored: the plain tensors of the files, by key.
        shapes: of the model's tensors, by name: a packed weight does not say its own.
        bits: of a value by the weight's name, as ``quanto_qmap.json`` or the config say; the files tell most of them.
    """
    bases = {_base(name) for name in stored if name.endswith("._data")}
    made: dict[str, BinTensor] = {}
    problems = []
    for base in sorted(bases):
        try:
            made[base] = _weight(base, stored, shapes, (bits or {}).get(base))
        except CannotMigrate as error:
            problems.append(f"{base} {error} ({error.hint})")
    parts = {f"{base}.{part}" for base in bases for part in ("_data", "_data._data", "_scale", "_shift")}
    tensors: dict[str, BinTensor] = {}
    left_out: dict[str, str] = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if _base(name) in made:
            tensors[_base(name)] = made[_base(name)]
        elif leaf in _ACTIVATIONS and tensor.shape == () and f"{module}.weight" in bases:
            left_out[name] = "a scale for activations, which torchao's tensor classes have no place for"
        elif name not in parts:
            tensors[name] = tensor
    return QuantoTensors(tensors, left_out, tuple(problems))


def is_packed(names: Iterable[str]) -> bool:
    """Whether some weights have less than 8 bits, so that the model has to tell their shapes."""
    return any(name.endswith("._data._data") for name in names)


def _base(name: str) -> str:
    """The weight that codes belong to."""
    return name.removesuffix("._data").removesuffix("._data")


def _weight(
    base: str, stored: Mapping[str, BinTensor], shapes: Mapping[str, tuple[int, ...]], bits: int | None
) -> BinTensor:
    packed = f"{base}._data._data" in stored
    names = {"data": f"{base}._data._data" if packed else f"{base}._data", "scale": f"{base}._scale"}
    names |= {"shift": f"{base}._shift"} if packed else {}
    for name in names.values():
        if name not in stored:
            raise CannotMigrate(f"has no {name.removeprefix(base + '.')}", _COPY)
    inner = {part: stored[name] for part, name in names.items()}
    if packed and base not in shapes:
        raise CannotMigrate("is packed, and the model has no tensor of this name that tells its shape", _AGAIN)
    shape = shapes[base] if packed else inner["data"].shape
    if shapes.get(base, shape) != shape:
        raise CannotMigrate(f"has the shape {shape}, but the model's is {shapes[base]}", _AGAIN)
    dtype = inner["scale"].dtype
    return BinTensor(BITS if packed else BYTES, dtype, shape, None, inner, {"bits": bits}, False, "cpu")


def decide(tensor: BinTensor, read: Read, *, exact: bool = False) -> Outcome:
    """What becomes of a weight by Quanto.

    Args:
        tensor: as :func:`collect` made it.
        read: gives the elements of scales and shifts.
        exact: give the values of a packed weight, where torchao's class would round its zero points.

    Raises:
        CannotMigrate: parts that do not fit each other.
    """
    import_torchao()
    return _decide_bits(tensor, read, exact) if tensor.class_name == BITS else _decide_bytes(tensor, read)


def _decide_bytes(tensor: BinTensor, read: Read) -> Outcome:
    data, scale = tensor.inner["data"], tensor.inner["scale"]
    rows, rest = tensor.shape[:1], tensor.shape[1:]
    if scale.shape not in ((), (*rows, *(1 for _ in rest))):
        raise CannotMigrate(f"its scale has the shape {scale.shape}, its values {data.shape}", _AGAIN)
    if len(tensor.shape) != 2:
        return _as_values(tensor, "it is the weight of a convolution")
    if scale.shape == () or data.dtype not in ("int8", *_FLOAT8):
        return _as_values(tensor, f"torchao quantizes no weights to {data.dtype} with such a scale")
    if data.dtype == "int8":
        lost = int((read(scale) == 0).sum())
        return Outcome(
            lambda read: _make_int8(tensor, read), SchemeName("int8wo"), _LOST.format(lost) if lost else None
        )
    return Outcome(lambda read: _make_float8(tensor, read), SchemeName(_FLOAT8[data.dtype]))


def _make_int8(tensor: BinTensor, read: Read) -> torch.Tensor:
    from torchao.quantization import Int8Tensor

    scale, codes = _with_scales(read(tensor.inner["scale"]), read(tensor.inner["data"]))
    zero = torch.zeros_like(scale, dtype=torch.int8)
    made: torch.Tensor = Int8Tensor(codes, scale, [1, tensor.shape[1]], dtype_of(tensor), zero_point=zero)
    return made


def _with_scales(scale: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and codes, one row for each scale; values without a scale are zeros by a scale of 1."""
    lost = scale == 0
    return scale.masked_fill(lost, 1), codes.masked_fill(lost, 0)


def _make_float8(tensor: BinTensor, read: Read) -> torch.Tensor:
    from torchao.quantization import Float8Tensor

    scale = read(tensor.inner["scale"]).to(torch.float32)
    made: torch.Tensor = Float8Tensor(
        read(tensor.inner["data"]), scale, block_size=[1, tensor.shape[1]], dtype=dtype_of(tensor)
    )
    return made


def _decide_bits(tensor: BinTensor, read: Read, exact: bool) -> Outcome:
    group, bits = _layout(tensor)
    if len(tensor.shape) != 2:
        return _as_values(tensor, "it is the weight of a convolution")
    if exact:
        return _as_values(tensor, "its zero points are values, which torchao's class would round")
    scale, shift = read(tensor.inner["scale"]), read(tensor.inner["shift"])
    if not shift.is_floating_point():
        return _as_values(tensor, "its zero points are codes in a packed weight")
    if bool(((scale == 0) & (shift != 0)).any()):
        return _as_values(tensor, "some of its groups have no scale, only a value")
    scheme = SchemeName(f"intx{bits}wo", group if group < tensor.shape[1] else None)
    lost = int((scale == 0).sum())
    reason = f"{_ROUNDED}; {_LOST.format(lost)}" if lost else _ROUNDED
    return Outcome(lambda read: _make_intx(tensor, read), scheme, reason)


def _layout(tensor: BinTensor) -> tuple[int, int]:
    """Values that share a scale, and bits of a value.

    Raises:
        CannotMigrate: the packed bytes, the scales and the weight's shape do not fit each other.
    """
    data, scale, shift = (tensor.inner[part] for part in ("data", "scale", "shift"))
    count, groups = math.prod(tensor.shape), math.prod(scale.shape)
    said = tensor.attributes.get("bits")
    fits = data.dtype == "uint8" and scale.shape == shift.shape and groups and data.shape and count % groups == 0
    if fits and math.prod(data.shape[1:]) == count // groups:
        fitting = [bits for bits in (4, 2) if data.shape[0] == -(-groups * bits // 8)]
        if len(fitting) == 2 and said is None:
            raise CannotMigrate("its files do not tell whether it has 4 or 2 bits", "add the quanto_qmap.json it lacks")
        for bits in fitting:
            if said in (None, bits):
                return count // groups, bits
    raise CannotMigrate(
        f"its packed bytes of shape {data.shape} and its scales of shape {scale.shape} do not fit its shape "
        f"{tensor.shape}",
        _AGAIN,
    )


def _codes(tensor: BinTensor, read: Read) -> torch.Tensor:
    """The unsigned codes, a row for each scale."""
    group, bits = _layout(tensor)
    packed = read(tensor.inner["data"]).reshape(-1, group)
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(parts)[: math.prod(tensor.inner["scale"].shape)]


def _make_intx(tensor: BinTensor, read: Read) -> torch.Tensor:
    """``(q − half − zero)·scale`` for Quanto's ``q·scale − shift``: the zero point is ``shift/scale − half``."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    group, bits = _layout(tensor)
    half = 2 ** (bits - 1)
    given, shift = (read(tensor.inner[part]).reshape(-1, 1) for part in ("scale", "shift"))
    scale, codes = _with_scales(given, _codes(tensor, read).to(torch.int8) - half)
    zero = (shift.float() / scale.float() - half).masked_fill(given == 0, 0)
    groups = (tensor.shape[0], -1)
    made: torch.Tensor = IntxUnpackedToInt8Tensor(
        codes.reshape(tensor.shape),
        scale.reshape(groups),
        zero.to(scale.dtype).reshape(groups),
        getattr(torch, f"int{bits}"),
        (1, group),
        dtype_of(tensor),
        None,
    )
    return made


def _as_values(tensor: BinTensor, reason: str) -> Outcome:
    return Outcome(lambda read: dequantize(tensor, read), None, reason)


def dequantize(tensor: BinTensor, read: Read) -> torch.Tensor:
    """The values that Quanto computes: ``scale·data``, or ``scale·q − shift``, each operation rounded to the dtype.

    Source: ``WeightQBytesDequantizer`` and ``WeightQBitsDequantizer`` of optimum-quanto 0.2.7.
    """
    scale = read(tensor.inner["scale"])
    if tensor.class_name == BYTES:
        return scale * read(tensor.inner["data"]).to(scale.dtype)
    groups, shift = scale.reshape(-1, 1), read(tensor.inner["shift"]).reshape(-1, 1)
    codes = _codes(tensor, read)
    values = groups * codes - shift if shift.is_floating_point() else groups * (codes - shift)
    return values.reshape(tensor.shape)
