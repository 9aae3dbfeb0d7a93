"""aoconvert turns a diffusers or transformers checkpoint into a torchao checkpoint, one tensor at a time.

    import aoconvert

    plan = aoconvert.plan("THUDM/CogVideoX-5b", "int8wo")
    result = aoconvert.quantize("THUDM/CogVideoX-5b", "int8wo", output="out")
    report = aoconvert.verify("out")
    pushed = aoconvert.push("user/CogVideoX-5b-int8wo", "out")

Importing it imports neither torch nor the model libraries.
"""

from aoconvert.version import __version__  # isort: skip

from aoconvert.api import (
    bench,
    card,
    convert,
    diff,
    evaluate,
    inspect,
    load,
    migrate,
    plan,
    push,
    quantize,
    repack,
    verify,
)
from aoconvert.errors import (
    AoconvertError,
    HubError,
    Interrupted,
    PlanError,
    QuantizeError,
    ReadError,
    SourceError,
    UnknownSchemeError,
    UsageError,
    VerificationError,
    WriteError,
)
from aoconvert.options import QuantizeOptions
from aoconvert.progress import Progress

__all__ = [
    "AoconvertError",
    "HubError",
    "Interrupted",
    "PlanError",
    "Progress",
    "QuantizeError",
    "QuantizeOptions",
    "ReadError",
    "SourceError",
    "UnknownSchemeError",
    "UsageError",
    "VerificationError",
    "WriteError",
    "__version__",
    "bench",
    "card",
    "convert",
    "diff",
    "evaluate",
    "inspect",
    "load",
    "migrate",
    "plan",
    "push",
    "quantize",
    "repack",
    "verify",
]
