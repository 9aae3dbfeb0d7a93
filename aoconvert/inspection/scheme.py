"""What a tensor is quantized to, from what the header says of it; the names are those of ``aoconvert schemes``.

Source of the classes and their fields: torchao 0.4 to 0.18; the table in the shared facts "legacy-checkpoints".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Symbol, Value
from aoconvert.inspection.compat import parts

_INT8_TENSOR = 8


def scheme_of(tensor: BinTensor) -> str | None:
    """The scheme of a tensor of a torchao class; ``None`` where its class is not known well enough."""
    chain = list(parts(tensor))
    by_name = {part.class_name.rpartition(".")[2]: part for part in chain}
    dynamic = "LinearActivationQuantizedTensor" in by_name
    for name, part in by_name.items():
        if (scheme := _of_class(name, part, dynamic, by_name)) is not None:
            return scheme
    return None


def _of_class(name: str, part: BinTensor, dynamic: bool, by_name: Mapping[str, BinTensor]) -> str | None:
    attributes = part.attributes
    if name == "AffineQuantizedTensor":
        return _affine(part, dynamic, by_name)
    if name == "Int8Tensor":
        return "int8wo" if attributes.get("act_quant_kwargs") is None else "int8dq"
    if name in ("Float8Tensor", "Float8TrainingTensor"):
        data = part.inner.get("qdata")
        kwargs = attributes.get("act_quant_kwargs")
        return _float8(data.dtype if data else None, kwargs is not None, _granularity(kwargs))
    if name == "IntxUnpackedToInt8Tensor":
        bits = _bits(attributes.get("target_dtype"))
        return _intx(bits, attributes.get("activation_quantization") is not None)
    if name == "IntxUnpackedTensor":  # torchao 0.13
        return _intx(_bits(attributes.get("target_dtype")), False)
    if name == "Int4Tensor" and attributes.get("activation_dtype") == Symbol("torch.float8_e4m3fn"):
        return "float8dq_int4"
    if name in _FIXED:
        return _FIXED[name]
    if name == "NVFP4Tensor":
        return "nvfp4wo" if attributes.get("act_quant_kwargs") is None else "nvfp4"
    if name == "MXTensor":
        element = _symbol(attributes.get("elem_dtype", attributes.get("_elem_dtype"))) or ""
        return _mx(element, attributes.get("act_quant_kwargs") is not None)
    return None


def _mx(element: str, dynamic: bool) -> str:
    """Today's torchao multiplies with activations in the same dtype; what older ones left alone is marked ``wo``."""
    found = next((scheme for dtype, scheme in _MX_ELEMENTS.items() if dtype in element), "mx")
    return found if dynamic else f"{found}wo"


_MX_ELEMENTS = {
    "float8_e4m3": "mxfp8",
    "float8_e5m2": "mxfp8_e5m2",
    "float4_e2m1": "mxfp4",
    "fp6_e2m3": "mxfp6_e2m3",
    "fp6_e3m2": "mxfp6_e3m2",
}


_FIXED = {
    "Int4Tensor": "int4wo",
    "Int4TilePackedTo4dTensor": "int4wo",
    "Int4PlainInt32Tensor": "int4wo",
    "Int4OpaqueTensor": "int4wo",
    "Int4PreshuffledTensor": "int4wo",
    "Int4MarlinSparseTensor": "int4wo_sparse",
    "FbgemmInt4Tensor": "int4wo",
    "FbgemmFp8Tensor": "float8dq",
    "NF4Tensor": "nf4",
    "MarlinQQQTensor": "int4_marlin_qqq",
}


def _affine(part: BinTensor, dynamic: bool, by_name: Mapping[str, BinTensor]) -> str | None:
    """``AffineQuantizedTensor``: the layout says how it is packed, the limits and dtypes what it holds."""
    names = " ".join(by_name)
    low, high = part.attributes.get("quant_min"), part.attributes.get("quant_max")
    if "UintxTensor" in by_name:
        bits = by_name["UintxTensor"].attributes.get("bit_width")
        return f"uint{bits}wo" if isinstance(bits, int) else None
    if "Float8AQT" in names:
        data = next((entry for name, entry in by_name.items() if name.startswith("Float8AQT")), part)
        stored = data.inner.get("float8_data")
        return _float8(stored.dtype if stored else None, dynamic)
    if "Int4PackedTensorImpl" in by_name:
        return "int4a4w"
    if re.search(r"\b(Fpx|Floatx)TensorCore", names):
        return _floatx(by_name)
    if re.search(r"TensorCoreTiled|Int4CPU|Int4XPU|MarlinSparse", names):
        return "int4wo_sparse" if "MarlinSparse" in names else "int4dq" if dynamic else "int4wo"
    if "DA8W4CPU" in names:
        return "int4dq"
    if "QDQ" in names or "PlainAQT" in names or "SemiSparse" in names or "Block" in names:
        return _integers(by_name, low, high, dynamic)
    return None


def _integers(by_name: Mapping[str, BinTensor], low: Value, high: Value, dynamic: bool) -> str | None:
    """One integer in a byte: the limits say how many bits it means."""
    stored = next((entry.inner["int_data"] for entry in by_name.values() if "int_data" in entry.inner), None)
    if stored is None:
        return None
    bits = (high - low).bit_length() if isinstance(low, int) and isinstance(high, int) else 8
    if stored.dtype == "uint8":
        return f"uint{bits}wo"
    return ("int8dq" if dynamic else "int8wo") if bits == _INT8_TENSOR else _intx(bits, dynamic)


def _floatx(by_name: Mapping[str, BinTensor]) -> str | None:
    for entry in by_name.values():
        for field in ("layout_type", "_layout"):
            layout = entry.attributes.get(field)
            if isinstance(layout, Instance):
                exponent, mantissa = layout.state.get("ebits"), layout.state.get("mbits")
                if isinstance(exponent, int) and isinstance(mantissa, int):
                    return f"fp{1 + exponent + mantissa}_e{exponent}m{mantissa}"
    return None


def _float8(dtype: str | None, dynamic: bool, granularity: str | None = None) -> str | None:
    if dtype is None or not dtype.startswith("float8"):
        return None
    if not dynamic:
        return "float8wo" + ("_e5m2" if "e5m2" in dtype else "")
    return "float8dq" + {"PerRow": "_row", "PerBlock": "_block"}.get(granularity or "", "")


def _granularity(kwargs: Value) -> str | None:
    """Of the activations: the last component of its class's name."""
    found = kwargs.state.get("granularity") if isinstance(kwargs, Instance) else None
    return found.class_name.rpartition(".")[2] if isinstance(found, Instance) else None


def _intx(bits: int | None, dynamic: bool) -> str | None:
    if bits is None:
        return None
    if not dynamic:
        return f"intx{bits}wo"
    return "int4dq" if bits == 4 else f"int8dq_int{bits}"


def _symbol(value: Value) -> str | None:
    return value.name if isinstance(value, Symbol) else value if isinstance(value, str) else None


def _bits(value: Value) -> int | None:
    """``torch.int4`` → 4."""
    match = re.fullmatch(r"(?:torch\.)?u?int(\d)", _symbol(value) or "")
    return int(match[1]) if match else None


def scheme_of_flat(class_name: str, data: Mapping[str, Any], stored: str | None) -> str | None:
    """As ``scheme_of``, for torchao's safetensors.

    Args:
        class_name: ``_type`` of the metadata entry.
        data: ``_data``, its attributes: plain values, ``{"_type", "_data"}`` objects and ``torch.`` names.
        stored: dtype of ``qdata``.
    """
    if class_name == "Int8Tensor":
        return "int8wo" if data.get("act_quant_kwargs") is None else "int8dq"
    kwargs = data.get("act_quant_kwargs")
    if class_name == "Float8Tensor":
        inner = kwargs.get("_data") if isinstance(kwargs, Mapping) else None
        granularity = inner.get("granularity") if isinstance(inner, Mapping) else None
        kind = str(granularity.get("_type")) if isinstance(granularity, Mapping) else None
        return _float8(stored, kwargs is not None, kind)
    if class_name == "IntxUnpackedToInt8Tensor":
        value = data.get("target_dtype")
        text = value.get("_data") if isinstance(value, Mapping) else value
        return _intx(
            _bits(f"torch.{str(text).removeprefix('torch.')}"), data.get("activation_quantization") is not None
        )
    if class_name == "NVFP4Tensor":
        return "nvfp4wo" if kwargs is None else "nvfp4"
    if class_name == "MXTensor":
        return _mx(str(data.get("elem_dtype")), kwargs is not None)
    return _FIXED.get(class_name)
