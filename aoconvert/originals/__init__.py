"""Quantized originals: which stored tensors make one of the model's, by the code of the format's own library."""

from aoconvert.originals.base import Original
from aoconvert.originals.methods import dequantize, describe, is_quantized, refuse_unsupported, without_quantization
from aoconvert.originals.reading import make_rows, working_bytes

__all__ = [
    "Original",
    "dequantize",
    "describe",
    "is_quantized",
    "make_rows",
    "refuse_unsupported",
    "without_quantization",
    "working_bytes",
]
