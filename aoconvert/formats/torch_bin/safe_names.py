"""The names a checkpoint's pickle may hold, and what each may be used for. Nothing here imports what it names.

Torch's names are those of ``torch._weights_only_unpickler._get_allowed_globals``, less what no checkpoint here needs
(sparse, nested and old quantized tensors, numpy, ``_codecs.encode``). torchao's are those that torchao 0.18 gives to
``torch.serialization.add_safe_globals`` in all its modules.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from aoconvert.formats.torch_bin.legacy_names import (
    LEGACY_DATA,
    LEGACY_ENUMS,
    LEGACY_FUNCTIONS,
    LEGACY_TENSORS,
    LEGACY_TUPLES,
)


class Kind(Enum):
    """What a name stands for, and with it the only ways in which a pickle may use it."""

    DTYPE = auto()
    """A value."""
    STORAGE = auto()
    """The kind of storage in a persistent id."""
    REBUILD = auto()
    """A function of ``torch._utils`` that makes a dense tensor; called."""
    PARAMETER = auto()
    """``_rebuild_parameter`` and its like; called with a tensor."""
    WRAPPER = auto()
    """``_rebuild_wrapper_subclass``; only handed to ``_rebuild_from_type_v2``."""
    FROM_TYPE = auto()
    """``_rebuild_from_type_v2``; called."""
    LAYOUT = auto()
    """``_get_layout``; called with a layout's name."""
    SIZE = auto()
    """``torch.Size``; called with integers."""
    DEVICE = auto()
    """``torch.device``; called with a device's name."""
    ORDERED_DICT = auto()
    """Called without arguments."""
    SET = auto()
    """Called with a list of primitives."""
    PLAIN_TENSOR = auto()
    """A tensor class without inner tensors: the type given to ``_rebuild_from_type_v2``."""
    TENSOR = auto()
    """A torchao tensor class: the type given to ``_rebuild_from_type_v2``."""
    DATA = auto()
    """A class made by ``NEWOBJ`` without arguments and given attributes by ``BUILD``."""
    TUPLE = auto()
    """A named tuple, made by ``NEWOBJ``."""
    ENUM = auto()
    """Called with the value of the member."""
    FUNCTION = auto()
    """A function held as a value and never called."""
    PARTIAL = auto()
    """``functools.partial`` over a ``FUNCTION``."""


@dataclass(frozen=True)
class Known:
    """A name on the list.

    Attributes:
        kind: what it may be used for.
        legacy: torchao 0.18 does not have it; the checkpoint can be read, not loaded.
    """

    kind: Kind
    legacy: bool = False


ITEMSIZE: Mapping[str, int] = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("bool", "uint8", "int8", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys([f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)], 1),
}
"""Bytes of one element by dtype, without ``torch.``; a sub-byte integer fills a byte, a ``_x2`` byte is one element."""

STORAGE_DTYPE: Mapping[str, str] = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.storage.UntypedStorage": "uint8",
}
"""Element dtype by the storage class that a persistent id names (``torch.storage._storage_type_to_dtype_map``)."""

_TORCH: Mapping[str, Kind] = {
    "torch._utils._rebuild_tensor": Kind.REBUILD,
    "torch._utils._rebuild_tensor_v2": Kind.REBUILD,
    "torch._utils._rebuild_tensor_v3": Kind.REBUILD,
    "torch._utils._rebuild_parameter": Kind.PARAMETER,
    "torch._utils._rebuild_parameter_with_state": Kind.PARAMETER,
    "torch._utils._rebuild_wrapper_subclass": Kind.WRAPPER,
    "torch._tensor._rebuild_from_type_v2": Kind.FROM_TYPE,
    "torch.serialization._get_layout": Kind.LAYOUT,
    "torch.Size": Kind.SIZE,
    "torch.device": Kind.DEVICE,
    "torch.Tensor": Kind.PLAIN_TENSOR,
    "torch.nn.parameter.Parameter": Kind.PLAIN_TENSOR,
    "collections.OrderedDict": Kind.ORDERED_DICT,
    "builtins.set": Kind.SET,
    "__builtin__.set": Kind.SET,  # what protocols 0 to 2 call it; unpicklers map Python 2's names to today's
}

_TENSORS: Mapping[str, str] = {
    "torchao.float8.float8_training_tensor": "Float8TrainingTensor",
    "torchao.float8.fsdp_utils": "WeightWithDynamicFloat8CastTensor",
    "torchao.optim.subclass_4bit": "OptimState4bit",
    "torchao.optim.subclass_8bit": "OptimState8bit",
    "torchao.optim.subclass_fp8": "OptimStateFp8",
    "torchao.prototype.float8_opaque_tensor": "Float8OpaqueTensor",
    "torchao.prototype.mx_formats.mx_tensor": "MXTensor",
    "torchao.prototype.mx_formats.nvfp4_tensor": "NVFP4Tensor",
    "torchao.prototype.quantization.float8_static_quant.prototype_float8_tensor": "PrototypeFloat8Tensor",
    "torchao.prototype.quantization.gguf.gguf_quantized_tensor": "GGUFQuantizedTensor",
    "torchao.prototype.quantization.int4": "Int4OpaqueTensor",
    "torchao.prototype.quantization.int8_lut_tensor.int8_lut_tensor": "Int8LutTensor",
    "torchao.prototype.quantization.uintx.uintx_bit_packed_tensor": "UIntxBitPackedTensor",
    "torchao.quantization": (
        "Float8Tensor Int4PlainInt32Tensor Int4PreshuffledTensor Int4Tensor Int4TilePackedTo4dTensor Int8Tensor "
        "IntxOpaqueTensor IntxUnpackedToInt8Tensor"
    ),
    "torchao.quantization.quantize_.workflows.float8.float8_sparse_2x4_1d_data_1d_metadata_tensor": (
        "Float8Sparse2x4_1DData1DMetadataTensor"
    ),
    "torchao.quantization.quantize_.workflows.float8.float8_sparse_2x4_2d_data_2d_metadata_tensor": (
        "Float8Sparse2x4_2DData2DMetadataTensor"
    ),
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor": "NF4Tensor",
}

_DATA: Mapping[str, str] = {
    "torchao.prototype.mx_formats.mx_tensor": "QuantizeTensorToMXKwargs",
    "torchao.prototype.mx_formats.nvfp4_tensor": "QuantizeTensorToNVFP4Kwargs",
    "torchao.quantization.granularity": "PerBlock PerRow PerTensor",
    "torchao.quantization.quantize_.workflows.float8.float8_tensor": "QuantizeTensorToFloat8Kwargs",
    "torchao.quantization.quantize_.workflows.int8.int8_tensor": "QuantizeTensorToInt8Kwargs",
}

_TUPLES: Mapping[str, str] = {
    "torchao.float8.float8_training_tensor": "LinearMMConfig ScaledMMConfig",
    "torchao.float8.inference": "Float8MMConfig",
}

_ENUMS: Mapping[str, str] = {
    "torchao.float8.config": "ScalingGranularity",
    "torchao.float8.float8_training_tensor": "GemmInputRole",
    "torchao.prototype.mx_formats.config": "ScaleCalculationMode",
    "torchao.quantization.quant_primitives": "MappingType ZeroPointDomain",
    "torchao.quantization.quantize_.common.kernel_preference": "KernelPreference",
    "torchao.quantization.quantize_.workflows.float8.float8_packing_format": "Float8PackingFormat",
    "torchao.quantization.quantize_.workflows.intx.intx_packing_format": "IntxPackingFormat",
    "torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor": (
        "IntxUnpackedToInt8TensorActivationQuantization"
    ),
}


def _names(table: Mapping[str, str]) -> Iterator[str]:
    for module, names in table.items():
        for name in names.split():
            yield f"{module}.{name}"


@functools.cache
def list_names() -> Mapping[str, Known]:
    """The whole list, by dotted name."""
    known = {name: Known(kind) for name, kind in _TORCH.items()}
    known |= {f"torch.{dtype}": Known(Kind.DTYPE) for dtype in ITEMSIZE}
    known |= {name: Known(Kind.STORAGE) for name in STORAGE_DTYPE}
    known["functools.partial"] = Known(Kind.PARTIAL, legacy=True)
    legacy = (
        (LEGACY_TENSORS, Kind.TENSOR),
        (LEGACY_DATA, Kind.DATA),
        (LEGACY_ENUMS, Kind.ENUM),
        (LEGACY_TUPLES, Kind.TUPLE),
        (LEGACY_FUNCTIONS, Kind.FUNCTION),
    )
    for table, kind in legacy:
        known |= {name: Known(kind, legacy=True) for name in _names(table)}
    current = ((_TENSORS, Kind.TENSOR), (_DATA, Kind.DATA), (_TUPLES, Kind.TUPLE), (_ENUMS, Kind.ENUM))
    for table, kind in current:
        known |= {name: Known(kind) for name in _names(table)}
    return known


def lookup(module: str, name: str) -> Known | None:
    """What ``module.name`` may be used for; ``None`` when it is not on the list.

    A dotted ``name`` walks through attributes (``STACK_GLOBAL "torch" "serialization.os.system"``): never on the list.
    """
    return None if "." in name else list_names().get(f"{module}.{name}")
