"""Checkpoints by others: Quanto, bitsandbytes, compressed-tensors, GPTQ, AWQ and plain ones, by key names and config.

Sources: optimum-quanto 0.2.7 (shared facts "legacy-checkpoints"), bitsandbytes' ``Params4bit`` and ``Int8Params`` state
dicts, compressed-tensors' ``pack-quantized`` format, AutoGPTQ and AutoAWQ, the ``quant_method`` names of
``transformers.utils.quantization_config.QuantizationMethod`` and of diffusers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from aoconvert.inspection.types import TensorFact

Stored = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name → dtype (without ``torch.``) and shape, as they are in the file."""

_Kind = Callable[[Stored, Mapping[str, Any]], "tuple[TensorFact, ...] | None"]

# What loads which kind, by distribution name. Source: the quantizers of transformers 5.23 and diffusers 0.42.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torchao": ("torchao",),
    "torchao-safetensors": ("torchao",),
    "quanto": ("optimum-quanto",),
    "bitsandbytes": ("bitsandbytes",),
    "gguf": ("gguf",),
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("gptqmodel",),
    "awq": ("gptqmodel",),
    "plain": (),
    "unreadable": (),
}

_DTYPE_BITS = {"int8": 8, "uint8": 8, "float8_e4m3fn": 8, "float8_e5m2": 8}


def classify(stored: Stored, config: Mapping[str, Any]) -> tuple[str, tuple[TensorFact, ...]]:
    """The kind of a file without torchao classes, and the tensors of the model in it.

    Args:
        stored: every tensor in the file.
        config: ``quantization_config`` of the model, or empty.
    """
    for kind, read in _KINDS.items():
        if (facts := read(stored, config)) is not None:
            return kind, facts
    method = config.get("quant_method")
    plain = tuple(_plain(name, *value) for name, value in stored.items())
    if isinstance(method, str) and method not in ("torchao", *_KINDS) and _narrow(stored):
        marked = tuple(
            TensorFact(fact.name, fact.class_name, fact.dtype, fact.numel, method if _is_narrow(fact.dtype) else None)
            for fact in plain
        )
        return method, marked
    return "plain", plain


def scheme_of_kind(kind: str, config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    """What the config or header say of a kind whose tensors do not: GGUF's file type, compressed-tensors' format."""
    if kind == "gguf":
        return _GGUF_TYPES.get(metadata.get("general.file_type", ""))
    if kind == "compressed-tensors":
        value = config.get("format")
        return value if isinstance(value, str) else None
    return None


# llama.cpp's enum llama_ftype: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
GGUF_LANGUAGE_MODELS = frozenset(
    {
        *("bloom", "deci", "falcon", "gemma2", "gemma3", "gpt2", "llama", "mamba", "minimax-m2", "nemotron", "phi3"),
        *("qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2", "t5", "t5encoder"),
    }
)
"""``general.architecture`` of GGUF files that transformers converts, and ``quantize`` reads.

Source: ``transformers.modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES``, in llama.cpp's names.
"""

_GGUF_TYPES = {
    "0": "F32",
    "1": "F16",
    "2": "Q4_0",
    "3": "Q4_1",
    "7": "Q8_0",
    "8": "Q5_0",
    "9": "Q5_1",
    "10": "Q2_K",
    "11": "Q3_K_S",
    "12": "Q3_K_M",
    "13": "Q3_K_L",
    "14": "Q4_K_S",
    "15": "Q4_K_M",
    "16": "Q5_K_S",
    "17": "Q5_K_M",
    "18": "Q6_K",
    "32": "BF16",
}


def _quanto(stored: Stored, config: Mapping[str, Any]) -> tuple[TensorFact, ...] | None:
    """Keys ``W.weight._data`` (8 bits) or ``W.weight._data._data`` (packed), with ``_scale`` and ``_shift``."""
    if not any(name.endswith(("weight._data", "weight._data._data")) for name in stored):
        return None
    wanted = config.get("weights_dtype")
    facts = []
    for name, (dtype, shape) in stored.items():
        base = name.removesuffix("._data").removesuffix("._data")
        if base == name:
            module, _, leaf = name.rpartition(".")
            helps = leaf in ("_scale", "_shift") or (
                leaf in ("input_scale", "output_scale") and f"{module}.weight._scale" in stored
            )
            facts.append(TensorFact(name, "torch.Tensor", dtype, 0 if helps else math.prod(shape)))
            continue
        packed = name.endswith("._data._data")
        bits = _quanto_bits(stored, name, base, wanted) if packed else 8
        scheme = f"quanto_int{bits}" if packed or dtype == "int8" else f"quanto_{dtype.removesuffix('fn')}"
        class_name = f"optimum.quanto.{'WeightQBitsTensor' if packed else 'WeightQBytesTensor'}"
        facts.append(TensorFact(base, class_name, dtype, math.prod(shape) * (8 // bits), scheme))
    return tuple(facts)


def _quanto_bits(stored: Stored, name: str, base: str, wanted: object) -> int:
    """4 or 2: the rows of the scale against those that a byte row holds; the config where it says."""
    if wanted in ("int2", "int4"):
        return int(str(wanted)[-1])
    rows, scales = stored[name][1][:1], stored.get(f"{base}._scale", ("", ()))[1][:1]
    return 2 if rows and scales and scales[0] > 2 * rows[0] else 4


def _bitsandbytes(stored: Stored, config: Mapping[str, Any]) -> tuple[TensorFact, ...] | None:
    """4 bits: ``W.weight`` uint8 with ``W.weight.quant_state.bitsandbytes__nf4``; 8 bits: int8 with ``W.SCB``."""
    states = {match[1]: match[2] for name in stored if (match := _BNB_STATE.fullmatch(name))}
    rows = {name.removesuffix(".SCB") + ".weight" for name in stored if name.endswith(".SCB")}
    if not states and not rows:
        return None
    facts = []
    for name, (dtype, shape) in stored.items():
        if name in states:
            facts.append(
                TensorFact(name, "bitsandbytes.Params4bit", dtype, 2 * math.prod(shape), f"bnb_{states[name]}")
            )
        elif name in rows:
            facts.append(TensorFact(name, "bitsandbytes.Int8Params", dtype, math.prod(shape), "bnb_int8"))
        else:
            helps = _BNB_HELPERS.search(name) is not None
            facts.append(TensorFact(name, "torch.Tensor", dtype, 0 if helps else math.prod(shape)))
    return tuple(facts)


_BNB_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_BNB_HELPERS = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.")


def _read_compressed(stored: Stored, config: Mapping[str, Any]) -> tuple[TensorFact, ...] | None:
    """``weight_packed`` (int32, several values each) or an 8-bit ``weight``, with ``weight_scale``."""
    packed = any(name.endswith(".weight_packed") for name in stored)
    if not packed and config.get("quant_method") != "compressed-tensors":
        return None
    bits = _config_bits(config)
    scheme = f"compressed_{config.get('format') or ('pack-quantized' if packed else 'tensors')}"
    facts = []
    for name, (dtype, shape) in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            values = 8 * _width(dtype) // (bits or 4)
            facts.append(TensorFact(f"{module}.weight", "compressed_tensors", dtype, math.prod(shape) * values, scheme))
        elif leaf == "weight" and f"{module}.weight_scale" in stored:
            facts.append(TensorFact(name, "compressed_tensors", dtype, math.prod(shape), scheme))
        else:
            helps = leaf.startswith(("weight_", "input_", "output_", "k_scale", "v_scale")) and leaf != "weight"
            facts.append(TensorFact(name, "torch.Tensor", dtype, 0 if helps else math.prod(shape)))
    return tuple(facts) if any(fact.scheme for fact in facts) else None


def _read_packed_rows(stored: Stored, config: Mapping[str, Any], kind: str) -> tuple[TensorFact, ...] | None:
    """GPTQ (with ``g_idx``, packed along the input) and AWQ (packed along the output): ``qweight, qzeros, scales``."""
    modules = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    modules = {module for module in modules if f"{module}.scales" in stored}
    method = config.get("quant_method")
    if not modules or (method if method in ("gptq", "awq") else _packing(stored, modules)) != kind:
        return None
    bits = _config_bits(config) or 4
    facts = []
    for name, (dtype, shape) in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight" and module in modules:
            numel = math.prod(shape) * 8 * _width(dtype) // bits
            facts.append(TensorFact(f"{module}.weight", kind, dtype, numel, f"{kind}_int{bits}"))
        else:
            helps = module in modules and leaf in ("qzeros", "scales", "g_idx")
            facts.append(TensorFact(name, "torch.Tensor", dtype, 0 if helps else math.prod(shape)))
    return tuple(facts)


def _packing(stored: Stored, modules: set[str]) -> str:
    return "gptq" if any(f"{module}.g_idx" in stored for module in modules) else "awq"


_KINDS: Mapping[str, _Kind] = {
    "quanto": _quanto,
    "bitsandbytes": _bitsandbytes,
    "gptq": lambda stored, config: _read_packed_rows(stored, config, "gptq"),
    "awq": lambda stored, config: _read_packed_rows(stored, config, "awq"),
    "compressed-tensors": _read_compressed,
}


def _config_bits(config: Mapping[str, Any]) -> int | None:
    """``bits`` (GPTQ, AWQ), or ``config_groups.*.weights.num_bits`` (compressed-tensors)."""
    groups = config.get("config_groups")
    found = [config.get("bits"), config.get("w_bit")]
    if isinstance(groups, Mapping):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        found += [value.get("num_bits") for value in weights if isinstance(value, Mapping)]
    return next((value for value in found if type(value) is int and 1 <= value <= 8), None)


def _plain(name: str, dtype: str, shape: tuple[int, ...]) -> TensorFact:
    return TensorFact(name, "torch.Tensor", dtype, math.prod(shape))


def _width(dtype: str) -> int:
    match = re.search(r"(\d+)", dtype)
    return max(1, int(match[1]) // 8) if match else 1


def _is_narrow(dtype: str) -> bool:
    return dtype in _DTYPE_BITS or dtype.startswith("float4")


def _narrow(stored: Stored) -> bool:
    return any(_is_narrow(dtype) for dtype, _ in stored.values())
