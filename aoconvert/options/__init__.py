"""What the user asked for: frozen values that the command line and the Python API both fill in."""

from aoconvert.options.fields import parse_size
from aoconvert.options.hub import DEFAULT_HUB, HubOptions
from aoconvert.options.quantize import (
    AUTO,
    DEFAULT_DTYPE,
    DTYPES,
    LAYOUT_DEVICES,
    QuantizeKwargs,
    QuantizeOptions,
    make_options,
)
from aoconvert.options.verify import VerifyKwargs, VerifyOptions

__all__ = [
    "AUTO",
    "DEFAULT_DTYPE",
    "DEFAULT_HUB",
    "DTYPES",
    "LAYOUT_DEVICES",
    "HubOptions",
    "QuantizeKwargs",
    "QuantizeOptions",
    "VerifyKwargs",
    "VerifyOptions",
    "make_options",
    "parse_size",
]
