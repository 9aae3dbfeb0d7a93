"""The methods of quantization that an original may have by ``quant_method``. To add one: its module, and a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from aoconvert.environment import version_of
from aoconvert.errors import SourceError
from aoconvert.models.base import ModelPart, SourceTensor
from aoconvert.originals.base import Original, Peek, Sorted

_KEYS = ("quantization_config", "compression_config")
GGUF = "gguf"
_DIFFUSERS = ("bitsandbytes", GGUF)
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class _Method:
    """A method.

    Attributes:
        package: whose code makes the values: the distribution.
        module: its name for an import.
        import_sort: imports what takes the quantized tensors of a checkpoint, and says how they are stored.
    """

    package: str
    module: str
    import_sort: Callable[[], Callable[[Sorted], str]]


def _block_fp8() -> Callable[[Sorted], str]:
    from aoconvert.originals.block_fp8 import sort

    return sort


def _compressed() -> Callable[[Sorted], str]:
    from aoconvert.originals.compressed import sort

    return sort


def _mxfp4() -> Callable[[Sorted], str]:
    from aoconvert.originals.mxfp4 import sort

    return sort


def _bitsandbytes() -> Callable[[Sorted], str]:
    from aoconvert.originals.bnb import sort

    return sort


def _gguf() -> Callable[[Sorted], str]:
    from aoconvert.originals.gguf import sort

    return sort


def _modelopt() -> Callable[[Sorted], str]:
    from aoconvert.originals.modelopt import sort

    return sort


METHODS: Mapping[str, _Method] = {
    "fp8": _Method("transformers", "transformers", _block_fp8),
    "compressed-tensors": _Method("compressed-tensors", "compressed_tensors", _compressed),
    "bitsandbytes": _Method("bitsandbytes", "bitsandbytes", _bitsandbytes),
    "mxfp4": _Method("transformers", "transformers", _mxfp4),
    GGUF: _Method("gguf", "gguf", _gguf),
    # a product of codes and scales: NVIDIA's package would add nothing to it
    "modelopt": _Method("torch", "torch", _modelopt),
}
"""By ``quant_method``."""

MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
"""``quant_algo`` of ModelOpt that are read."""

_ADVICE = {
    "torchao": "start from the original, unquantized model; aoconvert migrate renews an old checkpoint",
    "quanto": "aoconvert migrate carries its codes over to torchao; or start from the original, unquantized model",
}


def _quantization(component: ModelPart) -> Mapping[str, Any]:
    """``quantization_config``, or ``compression_config`` as older compressed-tensors wrote it; empty without."""
    found = next((value for key in _KEYS if (value := component.config.get(key))), None)
    return found if isinstance(found, dict) else {}


def is_quantized(component: ModelPart) -> bool:
    """Whether its config says that its weights are quantized."""
    return bool(_quantization(component))


def _name(config: Mapping[str, Any]) -> str:
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method) if method is not None else "an unknown method"


def refuse_unsupported(component: ModelPart) -> None:
    """Refuse a model whose weights are quantized by a method that is not dequantized here. Imports no torch.

    Raises:
        SourceError: with the method, and what to do.
    """
    config = _quantization(component)
    if not config:
        return
    method = METHODS.get(name := _name(config))
    if component.library != "transformers" and name not in _DIFFUSERS:
        method = None
    if method is None:
        known = ", ".join(sorted(METHODS))
        raise SourceError(
            f"{component.title} is already quantized ({name})",
            hint=_ADVICE.get(name, f"start from the original, unquantized model; of quantized ones {known} are read"),
        )
    algorithm = str(config.get("quant_algo"))
    if name == "modelopt" and algorithm not in MODELOPT:
        raise SourceError(
            f"{component.title} is already quantized (modelopt, {algorithm})",
            hint=f"start from the original, unquantized model; of ModelOpt's, {' and '.join(MODELOPT)} are read",
        )
    if find_spec(method.module) is None:
        raise SourceError(
            f"{component.title} is already quantized ({name}), and {method.package} is not installed",
            hint=f"pip install {method.package}: its code gives the values back",
        )


def without_quantization(component: ModelPart) -> ModelPart:
    """The model as its config describes it without quantization."""
    if not any(key in component.config for key in _KEYS):
        return component
    return replace(component, config={key: value for key, value in component.config.items() if key not in _KEYS})


def dequantize(
    component: ModelPart, tensors: Mapping[str, SourceTensor], peek: Peek
) -> tuple[dict[str, SourceTensor], dict[str, str], Original]:
    """The tensors of a quantized checkpoint as if they were not quantized.

    Args:
        component: the model, with the config of its quantization.
        tensors: what is stored, by name.
        peek: reads a small one of them.

    Returns:
        The tensors by name, in the order of the stored ones; what is left out, and why; how it was quantized.

    Raises:
        SourceError: parts are missing, or do not fit together.
    """
    refuse_unsupported(component)
    config = _quantization(component)
    name = _name(config)
    method = METHODS[name]
    found = Sorted(without_quantization(component), config, dict(tensors), peek)
    how = method.import_sort()(found)
    if not found.made and name != GGUF:
        raise found.damaged(f"its config says that it is quantized ({name}), but none of its tensors is")
    places = {tensor.formula.parts[0].name: tensor for tensor in found.made.values() if tensor.formula is not None}
    whole = {}
    for stored, tensor in tensors.items():
        if stored in places:
            whole[places[stored].name] = places[stored]
        elif stored in found.left:
            whole[stored] = tensor
    by = f"{method.package} {version_of(method.package)}"
    dtype, count = _dtype(component.config), len(found.made)
    if name == GGUF:
        from aoconvert.originals.gguf import model_dtype

        dtype = model_dtype(list(tensors.values()))
        count = sum(
            any(part.packing for part in tensor.formula.parts) for tensor in found.made.values() if tensor.formula
        )
    return whole, found.dropped, Original(name, how, by, dtype, count)


def _dtype(config: Mapping[str, Any]) -> str:
    """What the config says that the model runs in: that of its text model where it is composed."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if values.get(key) in _DTYPES:
                return str(values[key])
    return "bfloat16"


def describe(original: Original) -> str:
    """One line for a plan."""
    if not original.tensors:
        return f"the source is a {original.method.upper()} file that is not quantized ({original.how})"
    return (
        f"the source is quantized ({original.method}: {original.how}); {original.dequantized_by} gives its values back"
    )
