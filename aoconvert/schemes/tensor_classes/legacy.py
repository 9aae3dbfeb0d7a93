"""Classes of older torchao, 0.4 to 0.17: what their headers say, and which device could use them. Imports no torch."""

from __future__ import annotations

import re

from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Value
from aoconvert.schemes.tensor_classes.current import (
    CUDA_8,
    INT4_OPAQUE,
    INT8,
    INTX,
    ONE_MACHINE,
    describe_int4,
    float8,
)
from aoconvert.schemes.tensor_classes.entry import PackedLayout, TensorClass, WeightFacts, Within, integer


def _affine(part: BinTensor, within: Within) -> WeightFacts | str | None:
    """The layout says how it is packed, the limits and dtypes what it holds."""
    names = " ".join(within)
    dynamic = "LinearActivationQuantizedTensor" in within
    if "UintxTensor" in within:
        bits = within["UintxTensor"].attributes.get("bit_width")
        return WeightFacts(INTX, f"int{bits}", asymmetric=True) if isinstance(bits, int) else None
    if "Float8AQT" in names:
        data = next((entry for name, entry in within.items() if name.startswith("Float8AQT")), part)
        stored = data.inner.get("float8_data")
        return float8(stored.dtype if stored else None, dynamic)
    if "Int4PackedTensorImpl" in within:
        return "int4a4w"
    if re.search(r"\b(Fpx|Floatx)TensorCore", names):
        return _floatx(within)
    if "MarlinSparse" in names:
        return "int4wo_sparse"
    if re.search(r"TensorCoreTiled|Int4CPU|Int4XPU", names):
        return WeightFacts(INTX, "int4", dynamic) if dynamic else WeightFacts(INT4_OPAQUE)
    if "DA8W4CPU" in names:
        return WeightFacts(INTX, "int4", dynamic=True)
    if "QDQ" in names or "PlainAQT" in names or "SemiSparse" in names or "Block" in names:
        return _integers(within, part.attributes.get("quant_min"), part.attributes.get("quant_max"), dynamic)
    return None


def _integers(within: Within, low: Value, high: Value, dynamic: bool) -> WeightFacts | None:
    """One integer in a byte: the limits say how many bits it means."""
    stored = next((entry.inner["int_data"] for entry in within.values() if "int_data" in entry.inner), None)
    if stored is None:
        return None
    bits = (high - low).bit_length() if isinstance(low, int) and isinstance(high, int) else 8
    if stored.dtype == "uint8":
        return WeightFacts(INTX, f"int{bits}", asymmetric=True)
    return WeightFacts(INT8, dynamic=dynamic) if bits == 8 else WeightFacts(INTX, f"int{bits}", dynamic)


def _floatx(within: Within) -> str | None:
    """Floats of 1 to 7 bits, which no torchao has any more."""
    for entry in within.values():
        for field in ("layout_type", "_layout"):
            layout = entry.attributes.get(field)
            if isinstance(layout, Instance):
                exponent, mantissa = layout.state.get("ebits"), layout.state.get("mbits")
                if isinstance(exponent, int) and isinstance(mantissa, int):
                    return f"fp{1 + exponent + mantissa}_e{exponent}m{mantissa}"
    return None


def _describe_unpacked(part: BinTensor, within: Within) -> WeightFacts | None:
    dtype = integer(part.attributes.get("target_dtype"))
    return WeightFacts(INTX, dtype) if dtype else None


def _fbgemm_float8(part: BinTensor, within: Within) -> WeightFacts | None:
    return float8("float8", dynamic=True)


def _affine_layout(name: str, layout: PackedLayout) -> tuple[TensorClass, ...]:
    """A layout within an ``AffineQuantizedTensor``, by both names that it had."""
    return tuple(TensorClass(name=f"{name}{kind}", layout=layout) for kind in ("Layout", "TensorImpl"))


# Sources: ``get_device_capability()[0] >= 8`` in marlin_sparse_layout and marlin_qqq_tensor; the wheels on PyPI
LEGACY = (
    TensorClass(name="AffineQuantizedTensor", describe=_affine),
    TensorClass(name="IntxUnpackedTensor", describe=_describe_unpacked),
    TensorClass(name="Int4MarlinSparseTensor", describe=lambda part, within: "int4wo_sparse"),
    TensorClass(name="FbgemmInt4Tensor", describe=describe_int4),
    TensorClass(name="FbgemmFp8Tensor", describe=_fbgemm_float8),
    TensorClass(name="MarlinQQQTensor", describe=lambda part, within: "int4_marlin_qqq"),
    *_affine_layout("TensorCoreTiledAQT", CUDA_8),
    *_affine_layout("MarlinSparseAQT", CUDA_8),
    *_affine_layout("SemiSparseAQT", PackedLayout("cuda")),
    TensorClass(name="MarlinQQQAQTTensorImpl", layout=CUDA_8),
    TensorClass(name="CutlassSemiSparseTensorImpl", layout=PackedLayout("cuda")),
    TensorClass(name="Int4PackedTensorImpl", layout=PackedLayout("cuda")),
    TensorClass(
        name="Int4CPUAQTTensorImpl",
        layout=PackedLayout(
            "cpu", note=f"{ONE_MACHINE}; torchao 0.8 and 0.9 wrote broken weights in this layout when HQQ was on"
        ),
    ),
    TensorClass(
        name="DA8W4CPUAQTTensorImpl", layout=PackedLayout("cpu", note="its kernels are not in the wheels on PyPI")
    ),
    TensorClass(name="Int4XPUAQTTensorImpl", layout=PackedLayout("xpu")),
    *(TensorClass(name=f"Float8AQT{kind}", row_scales_until="0.11.0") for kind in ("TensorImpl", "Layout")),
)
