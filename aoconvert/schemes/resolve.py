"""From a scheme's name and settings to a :class:`Scheme`: the torchao config and what torchao makes of a weight.

Granularity, group size, stored bits and the rest are read off a small weight that torchao itself quantized with the
final config, so that they cannot differ from it, and a config that torchao refuses is refused here.
"""

from __future__ import annotations

import dataclasses
import importlib
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aoconvert.environment import import_torchao
from aoconvert.errors import PlanError, UsageError
from aoconvert.schemes import settings as values
from aoconvert.schemes.base import Layout, Scheme
from aoconvert.schemes.names import availability, find
from aoconvert.schemes.table import SchemeEntry, catalogue

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig


def get(name: str, *, group_size: int | None = None, settings: Mapping[str, str] | None = None) -> Scheme:
    """The scheme ``name`` with a group size and with fields of its torchao config (``--set``).

    Raises:
        UnknownSchemeError: no such scheme; the hint holds the nearest.
        UsageError: a setting or a group size that torchao, or the name, does not allow.
        PlanError: the scheme cannot run with the installed packages.
    """
    settings = settings or {}
    entry = find(name, settings)
    if (reason := availability(entry)) is not None:
        raise PlanError([f"scheme {entry.name} does not run here: {reason}"], hint="upgrade the package")
    import_torchao()
    config = _build(entry, group_size, settings)
    return _describe(entry, config, _sample(entry, config))


def _build(entry: SchemeEntry, group_size: int | None, settings: Mapping[str, str]) -> AOBaseConfig:
    """torchao's config: what the name fixes, then the group size, then the settings."""
    cls = getattr(importlib.import_module(entry.config.rpartition(".")[0]), entry.config_class)
    fields = {key: values.parse(cls, key, text) for key, text in entry.fields}
    for key, text in settings.items():
        value = values.parse(cls, key, text)
        if key in fields and fields[key] != value:
            fixed = dict(entry.fields)[key]
            raise UsageError(
                f"{key}={text!r} contradicts scheme {entry.name}, which has {key}={fixed}",
                hint=_other(entry, key, text),
            )
        fields[key] = value
    if group_size is not None:
        if entry.group_field is None:
            raise UsageError(f"{entry.name} has no group size: torchao quantizes it per row or per tensor")
        if entry.group_field in settings:
            raise UsageError(f"group size {group_size} and {entry.group_field} say the same thing", hint="give one")
        fields[entry.group_field] = values.group(group_size)
    try:
        config = cls(**fields)
    except (AssertionError, ValueError, TypeError) as error:
        hint = "use --group-size N" if "group_size" in settings else None
        raise UsageError(f"{entry.name}: torchao refuses this config: {_why(error)}", hint=hint) from error
    if config.version != cls.version:
        raise UsageError(f"version={config.version} of {entry.config_class} is gone, torchao has {cls.version}")
    return config


def _other(entry: SchemeEntry, key: str, text: str) -> str:
    """The scheme of the same config class that fixes ``key`` at this value, if there is one."""
    wanted = text.strip().lower().removeprefix("torch.")
    for other in catalogue():
        if other.config == entry.config and dict(other.fields).get(key) == wanted:
            return f"use scheme {other.name}"
    if key.endswith("packing_format"):
        return "other packings depend on the device that loads them and are not in this version"
    return "leave it out"


def _why(error: BaseException) -> str:
    """torchao's message in one line; for a bare assert, the condition."""
    if text := " ".join(str(error).split()):
        return text
    return traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__


def _sample(entry: SchemeEntry, config: AOBaseConfig) -> torch.Tensor:
    """A weight of 2 rows, in bfloat16 on the CPU, quantized by torchao with ``config``.

    Two groups a row where there are groups, so that per group cannot be taken for per row.

    Raises:
        UsageError: torchao cannot quantize with this config.
    """
    import torch
    from torchao.quantization import PerGroup, quantize_

    granularities = [value for value in vars(config).values() if isinstance(value, PerGroup)]
    in_features = 2 * granularities[0].group_size if granularities else 64
    linear = torch.nn.Linear(in_features, 2, bias=False, device="meta")
    weight = torch.linspace(-1, 1, 2 * in_features).reshape(2, in_features).to(torch.bfloat16)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    # inductor's settings are process-wide: a look at a scheme must not change them
    quiet = {"set_inductor_config": False} if hasattr(config, "set_inductor_config") else {}
    try:
        quantize_(linear, dataclasses.replace(config, **quiet))
    except Exception as error:
        raise UsageError(f"{entry.name}: torchao cannot quantize with this config: {_why(error)}") from error
    if type(linear.weight).__name__ != entry.tensor_class:
        raise UsageError(f"{entry.name}: with this config torchao makes a {type(linear.weight).__name__} instead")
    return linear.weight


def _describe(entry: SchemeEntry, config: AOBaseConfig, sample: Any) -> Scheme:
    """What torchao made of the sample, in words and numbers."""
    from torchao.core.config import config_to_dict

    in_features = sample.shape[1]
    block_rows, block_columns = sample.block_size
    group_size = block_columns if block_columns < in_features else None
    per_row = "per row" if group_size is None else f"per group of {group_size}"
    hqq = getattr(getattr(config, "intx_choose_qparams_algorithm", None), "name", None) == "HQQ_SCALE_ONLY"
    bits = 8.0 * sample.qdata.numel() * sample.qdata.element_size() / sample.numel()
    minimum = _min_torchao(entry, config, group_size)
    return Scheme(
        name=entry.name,
        config=config,
        config_dict=config_to_dict(config),
        meta_config=_without_hqq(config) if hqq else config,
        tensor_class=entry.tensor_class,
        weight_dtype=entry.weight_dtype,
        activation=_activation(sample),
        granularity=per_row if block_rows == 1 else "per tensor",
        group_size=group_size,
        # HQQ stops iterating when the worst row of the whole tensor has converged
        rowwise=block_rows == 1 and not hqq,
        needs_rows=entry.needs_rows,
        single_values=hqq,
        ranks=entry.ranks,
        layout=Layout("any", entry.packing, None, (f"torchao>={minimum}",)),
        min_torchao=minimum,
        summary=entry.summary,
        bits=bits,
        notes=_notes(entry, bits, group_size),
    )


def _without_hqq(config: AOBaseConfig) -> AOBaseConfig:
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    return dataclasses.replace(config, intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.AFFINE)


def _min_torchao(entry: SchemeEntry, config: AOBaseConfig, group_size: int | None) -> str:
    """Files of torchao 0.18 were loaded and run in 0.13, 0.14.1, 0.15, 0.16 and 0.17.

    Before 0.17, Int8Tensor loads groups but fails in forward, and silently takes asymmetric activations for symmetric.
    """
    asymmetric = getattr(getattr(config, "act_mapping_type", None), "name", None) == "ASYMMETRIC"
    if entry.tensor_class == "Int8Tensor" and (group_size is not None or asymmetric):
        return "0.17"
    return entry.min_torchao


def _activation(sample: Any) -> str | None:
    """What the quantized weight will do to its input."""
    if getattr(sample, "activation_quantization", None) is not None:
        return "int8 per token, asymmetric, dynamic"  # the one kind that IntxUnpackedToInt8Tensor knows
    if (kwargs := getattr(sample, "act_quant_kwargs", None)) is None:
        return None
    per = "per tensor" if type(kwargs.granularity).__name__ == "PerTensor" else "per token"
    return f"int8 {per}, {'asymmetric, ' if kwargs.mapping_type.name == 'ASYMMETRIC' else ''}dynamic"


def _notes(entry: SchemeEntry, bits: float, group_size: int | None) -> tuple[str, ...]:
    """What whoever chooses it should know first."""
    notes = []
    value_bits = int(entry.weight_dtype.removeprefix("int")) if entry.weight_dtype.startswith("int") else bits
    if value_bits < bits:
        notes.append(f"stores each {value_bits}-bit value in one byte: the file is not smaller than int8wo's")
        if group_size is None:
            notes.append("one scale for a whole row: a group size of 32 to 128 is more accurate")
    if entry.needs_rows:
        notes.append("fails in layers that see a single row of input (modulation, timestep): leave those out")
    return tuple(notes)
