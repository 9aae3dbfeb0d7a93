"""From a scheme's name and settings to a :class:`Scheme`: the torchao config and what torchao makes of a weight.

Granularity, group size, stored bits and the rest are read off a small weight that torchao itself quantized with the
final config, so that they cannot differ from it, and a config that torchao refuses is refused here.
"""

from __future__ import annotations

import dataclasses
import importlib
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from aoconvert.environment import import_torchao, quiet_imports
from aoconvert.errors import PlanError, UsageError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.humanize import with_article
from aoconvert.schemes import settings as values
from aoconvert.schemes.apply import flatten, quantize_with
from aoconvert.schemes.base import Layout, RowIndependence, Scheme, WeightFormat
from aoconvert.schemes.describe import activation, granularity_of, min_torchao, notes
from aoconvert.schemes.names import availability, find, preset_group_size
from aoconvert.schemes.table import INT4, SchemeEntry, catalogue

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

_LAYOUT_DEVICES = ("cpu", "cuda", "xpu", "plain")
_INT4_GROUP = 128  # torchao's default
_INT4_ALGORITHM = "int4_choose_qparams_algorithm"
_MEASURED = 4096  # rows, and about as many columns, of the weight whose bytes a parameter are given


def get(
    name: str,
    *,
    group_size: int | None = None,
    settings: Mapping[str, str] | None = None,
    layout_device: str | None = None,
) -> Scheme:
    """The scheme ``name`` with a group size and with fields of its torchao config (``--set``).

    Args:
        name: any of its names; one like ``int4wo-64`` brings its group size along.
        group_size: values that share a scale.
        settings: fields of the torchao config, as text.
        layout_device: what the packed weights are made for: ``cpu`` (and ``None``), ``cuda``, ``xpu``, or ``plain``.
            Only ``int4wo`` depends on it; other layouts are the same for every device.

    Raises:
        UnknownSchemeError: no such scheme; the hint holds the nearest.
        UsageError: a setting, a group size or a device that torchao, or the name, does not allow.
        PlanError: the scheme cannot run with the installed packages.
    """
    settings = settings or {}
    entry = find(name, settings)
    if layout_device is not None and layout_device not in _LAYOUT_DEVICES:
        raise UsageError(f"the device {layout_device!r} has no layout", hint=f"use {', '.join(_LAYOUT_DEVICES[:3])}")
    if group_size is None and entry.group_field not in settings:
        group_size = preset_group_size(name)
    if entry.layout_device is not None:
        entry = INT4[layout_device or entry.layout_device]
    if (reason := availability(entry)) is not None:
        raise PlanError([f"scheme {entry.name} does not run here: {reason}"], hint="upgrade the package")
    import_torchao()
    if entry.layout_device is not None:
        return _int4wo(entry, entry.layout_device, group_size, settings)
    return _of_config(entry, _build(entry, group_size, settings))


def _build(entry: SchemeEntry, group_size: int | None, settings: Mapping[str, str]) -> AOBaseConfig:
    """torchao's config: what the name fixes, then the group size, then the settings."""
    with quiet_imports():
        cls = getattr(importlib.import_module(entry.config.rpartition(".")[0]), entry.config_class)
    fields = {key: values.parse(cls, key, text) for key, text in entry.fields}
    for key, text in settings.items():
        value = values.parse(cls, key, text)
        if key in fields and fields[key] != value:
            fixed = dict(entry.fields)[key]
            raise UsageError(
                f"{key}={text!r} contradicts scheme {entry.name}, which has {key}={fixed}",
                hint=_other(entry, cls, key, value),
            )
        fields[key] = value
    fields = {key: values.parse(cls, key, text) for key, text in entry.defaults if key not in fields} | fields
    if group_size is not None:
        if entry.group_field is None:
            raise UsageError(f"{entry.name} has a fixed group size", hint="omit --group-size")
        if entry.group_field in settings:
            raise UsageError(f"group size {group_size} and {entry.group_field} set the same thing", hint="give one")
        fields[entry.group_field] = values.group(group_size)
    try:
        config: AOBaseConfig = cls(**fields)
    except (AssertionError, ValueError, TypeError) as error:
        hint = "use --group-size N" if "group_size" in settings else None
        raise UsageError(f"{entry.name}: torchao refuses this config: {_why(error)}", hint=hint) from error
    if config.version != cls.version:
        raise UsageError(f"version={config.version} of {entry.config_class} is gone, torchao has {cls.version}")
    if entry.config_class == "Float8DynamicActivationFloat8WeightConfig":
        _check_activations(entry, config)
    return config


def _check_activations(entry: SchemeEntry, config: Any) -> None:
    """What torchao 0.18 takes and then cannot multiply by, or what changes every product.

    Raises:
        UsageError: activations that are no float8, or a range for their largest value that has none.
    """
    import torch

    kinds = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    if config.activation_dtype not in kinds.values():
        found = dtype_name(config.activation_dtype)
        raise UsageError(f"{entry.name} cannot multiply by {found}", hint=f"activation_dtype can be {', '.join(kinds)}")
    low, high = config.activation_value_lb, config.activation_value_ub
    if (low is not None and low < 0) or (high is not None and high <= max(low or 0.0, 0.0)):
        raise UsageError(
            f"the largest value of an activation cannot be between {low} and {high}",
            hint="activation_value_lb must be 0 or more, activation_value_ub larger than it",
        )


def _other(entry: SchemeEntry, cls: type, key: str, value: Any) -> str:
    """The scheme of the same config class that fixes ``key`` at this value, if there is one."""
    rest = set(entry.fields) - {(key, dict(entry.fields)[key])}
    same = [other for other in catalogue() if other.config == entry.config]
    # of several the one that differs in nothing else
    for other in sorted(same, key=lambda other: len(rest - set(other.fields))):
        text = dict(other.fields).get(key)
        if text is not None and values.parse(cls, key, text) == value:
            return f"use scheme {other.name}"
    if key.endswith("packing_format"):
        return "other packings are for one device only: use int4wo, with --layout-device to choose it"
    return "omit it"


def _why(error: BaseException) -> str:
    """torchao's message in one line; for a bare assert, the condition."""
    if text := " ".join(str(error).split()):
        return text
    return traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__


def _sample(entry: SchemeEntry, config: AOBaseConfig) -> torch.Tensor:
    """A weight in bfloat16 on the CPU, quantized by torchao with ``config``.

    It has at least two groups a row where there are groups, so that per group cannot be taken for per row; and few
    elements: from some thousands on torch starts its worker threads, which a process that forks must not have.

    Raises:
        UsageError: torchao cannot quantize with this config.
    """
    import torch
    from torchao.quantization import PerGroup

    groups = [value.group_size for value in vars(config).values() if isinstance(value, PerGroup)]
    rows, columns = (2, 2 * groups[0]) if groups else (max(2, entry.multiples[0]), max(64, 2 * entry.multiples[1]))
    weight = torch.linspace(-1, 1, rows * columns).reshape(rows, columns).to(torch.bfloat16)
    try:
        made = quantize_with(weight, config)
    except Exception as error:
        raise UsageError(f"{entry.name}: torchao cannot quantize with this config: {_why(error)}") from error
    if type(made).__name__ != entry.tensor_class.name:
        raise UsageError(f"{entry.name}: with this config torchao creates {with_article(type(made).__name__)} instead")
    return made


def _of_config(entry: SchemeEntry, config: AOBaseConfig) -> Scheme:
    """The scheme that torchao's config alone describes."""
    sample: Any = _sample(entry, config)
    hqq = getattr(getattr(config, "intx_choose_qparams_algorithm", None), "name", None) == "HQQ_SCALE_ONLY"
    quantize = partial(quantize_with, config=config, meta_config=_without_hqq(config) if hqq else None)
    made = _format(sample, quantize)
    minimum = min_torchao(entry, config, made.group_size)
    bounded = getattr(config, "activation_value_lb", None) is not None
    return Scheme(
        entry=entry,
        config=config,
        format=made,
        layout=Layout(entry.device, entry.packing, entry.min_capability, (f"torchao>={minimum}",)),
        rows=_independence(entry, made, hqq=hqq),
        min_torchao=minimum,
        notes=notes(entry, made.bits, made.granularity, bounded=bounded),
        quantize=quantize,
    )


def _int4wo(entry: SchemeEntry, device: str, group_size: int | None, settings: Mapping[str, str]) -> Scheme:
    """``int4wo``: the config does not say everything, and torchao makes most layouts on their device only."""
    from torchao.quantization import Int4WeightOnlyConfig

    from aoconvert.schemes import int4

    parsed = {key: values.parse(Int4WeightOnlyConfig, key, text) for key, text in settings.items()}
    if extra := parsed.keys() - {_INT4_ALGORITHM, "group_size"}:
        raise UsageError(
            f"{min(extra)} of {entry.name} cannot be set",
            hint=f"--layout-device chooses the packing; --set can only set {_INT4_ALGORITHM}",
        )
    if group_size is not None and "group_size" in parsed:
        raise UsageError(f"group size {group_size} and group_size set the same thing", hint="give one")
    size = parsed.get("group_size", group_size or _INT4_GROUP) if group_size != 0 else 0
    algorithm = parsed[_INT4_ALGORITHM].value if _INT4_ALGORITHM in parsed else "tinygemm"
    config = int4.config(size, device, algorithm)
    if (reason := int4.unavailable(device)) is not None:
        raise PlanError([f"scheme {entry.name} does not run here: {reason}"])
    quantize = partial(int4.quantize, group_size=size, device=device, algorithm=algorithm)
    made = _format(quantize(_large(size)), quantize)
    requires = (f"torchao>={entry.min_torchao}", *(text for text in entry.requires if not text.startswith("torchao")))
    more = [f"unconfirmed: {entry.unconfirmed}"] if entry.unconfirmed else []
    packing = entry.packing
    if device == "cpu":
        packing = int4.machine_packing()
        more.append(
            f"packed in the {int4.machine_layout()} layout of this CPU: on CPUs with another layout it gives wrong "
            f"numbers"
        )
    return Scheme(
        entry=entry,
        config=config,
        format=made,
        layout=Layout(entry.device, packing, entry.min_capability, requires),
        rows=_independence(entry, made, hqq=algorithm == "hqq"),
        min_torchao=entry.min_torchao,
        notes=(*notes(entry, made.bits, made.granularity), *more),
        quantize=quantize,
        own_blocker=partial(int4.blocker, group_size=size, device=device),
    )


def _format(sample: Any, quantize: Callable[[torch.Tensor], torch.Tensor]) -> WeightFormat:
    """What torchao made of the sample, in words and numbers."""
    group_size, granularity = granularity_of(sample)
    large: Any = quantize(_large(group_size))
    stored = sum(getattr(large, name).nbytes for name in flatten(large)[0])
    bits = 8.0 * large.qdata.nbytes / large.numel()
    return WeightFormat(granularity, group_size, activation(sample), bits, stored / large.numel())


def _independence(entry: SchemeEntry, made: WeightFormat, *, hqq: bool) -> RowIndependence:
    """HQQ stops iterating when the worst row of the whole tensor has converged."""
    return RowIndependence(None if hqq else entry.tile, "per tensor" in made.granularity)


def _large(group_size: int | None) -> torch.Tensor:
    """A weight on ``meta`` of 4096 rows and about as many columns, a whole number of groups."""
    import torch

    group = group_size or 1
    columns = group * max(1, _MEASURED // group)
    return torch.empty(_MEASURED, columns, dtype=torch.bfloat16, device="meta")


def _without_hqq(config: AOBaseConfig) -> AOBaseConfig:
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    return dataclasses.replace(config, intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.AFFINE)
