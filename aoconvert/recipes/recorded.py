"""A recipe from what an earlier result says about itself: its ``config.json`` or its manifest."""

from __future__ import annotations

import contextlib
import enum
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from aoconvert.checkpoint.manifest import ComponentEntry, Manifest
from aoconvert.checkpoint.manifest_text import parse
from aoconvert.environment import import_torchao, quiet_imports
from aoconvert.errors import AoconvertError, UsageError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.recipes.base import Choice, Recipe, RecipeRule, Section
from aoconvert.recipes.foreign_configs import check_quantization
from aoconvert.schemes.table import INT4, SchemeEntry, catalogue

if TYPE_CHECKING:
    from aoconvert.schemes import Scheme

_NO_RECIPE = "use the config.json or the aoconvert.json of a checkpoint that torchao quantized"
# torchao's packing format -> the device that the layout is for. ``plain`` also stands for the CPU's layout, which has
# no config that can be read back (see aoconvert.schemes.int4).
_INT4_DEVICES = {"TILE_PACKED_TO_4D": "cuda", "PLAIN_INT32": "xpu", "PLAIN": "cpu"}


def from_json(raw: bytes | bytearray, origin: str) -> Recipe:
    """A recipe from the text of a ``config.json`` or a manifest.

    Raises:
        UsageError: it is neither, or its torchao config is not one that aoconvert can make.
    """
    try:
        values = parse(raw, constants=True)
    except ValueError as error:
        raise UsageError(f"recipe {origin}: {error}", hint=_NO_RECIPE) from None
    if isinstance(values, dict) and isinstance(values.get("quantization_config"), dict):
        library = "diffusers" if "_class_name" in values else "transformers"
        return from_quantization_config(values["quantization_config"], library, origin)
    if isinstance(values, dict) and "components" in values and "tool" in values:
        try:
            return from_manifest(Manifest.model_validate(values), origin)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UsageError(f"{origin} is not an aoconvert manifest: {place}: {first['msg']}") from None
    raise UsageError(f"{origin} says nothing about quantization", hint=_NO_RECIPE)


def from_quantization_config(values: Mapping[str, Any], library: str, origin: str = "config.json") -> Recipe:
    """A recipe from the ``quantization_config`` of a ``config.json``.

    Args:
        values: the ``quantization_config``.
        library: whose ``config.json`` it is: ``diffusers`` and ``transformers`` differ in what names in
            ``modules_to_not_convert`` mean.
        origin: name of the file, for messages and reasons.

    Raises:
        UsageError: it is not torchao's, or its torchao config is not one that aoconvert can make.
    """
    if values.get("quant_method") != "torchao":
        method = values.get("quant_method")
        raise UsageError(f"{origin}: quant_method is {method!r}, not 'torchao'", hint=_NO_RECIPE)
    try:
        check_quantization(values)
    except ValueError as error:
        raise UsageError(f"{origin}: {error}", hint=_NO_RECIPE) from None
    quant_type = values.get("quant_type")
    config = quant_type.get("default") if isinstance(quant_type, dict) else None
    if not isinstance(config, dict):
        raise UsageError(
            f"{origin}: quant_type does not hold a torchao config", hint="it was written by an old library"
        )
    skipped = values.get("modules_to_not_convert") or []
    if not (isinstance(skipped, list) and all(isinstance(name, str) and name for name in skipped)):
        raise UsageError(f"{origin}: modules_to_not_convert is not a list of names")
    left_out = tuple(RecipeRule(_as_pattern(name, library), Choice(None)) for name in dict.fromkeys(skipped))
    section = from_config(config, origin)
    return Recipe(origin, Section(section.default, (*left_out, *section.rules)))


def _as_pattern(entry: str, library: str) -> str:
    """What an entry of ``modules_to_not_convert`` matches among the names of parameters.

    diffusers (``TorchAoHfQuantizer.check_if_quantized_param``): a name that holds the entry and a dot, or is the entry.
    transformers (``quantizers_utils.should_convert_module``): a name that begins with the entry, as a regular
    expression up to the end of a part, or ends in it.
    """
    literal = re.escape(entry)
    if library == "diffusers":
        return rf"re:.*{literal}\..*|{literal}"
    try:
        re.compile(entry)
    except (re.error, RecursionError, OverflowError):
        entry = literal
    pattern = rf"re:(?:{entry})(?:(?<=\.)|(?=\.|$)).*"
    return rf"{pattern}|.*{literal}" if entry.endswith(".weight") else pattern


def from_manifest(manifest: Manifest, origin: str = "aoconvert.json") -> Recipe:
    """A recipe from the manifest of a result: with the same source, it makes the same decisions.

    Raises:
        UsageError: a torchao config in it is not one that aoconvert can make.
    """
    sections = {part.name: _of_component(part, origin) for part in manifest.components}
    if set(sections) == {""}:
        return Recipe(origin, sections[""])
    return Recipe(origin, components=MappingProxyType(sections))


def _of_component(part: ComponentEntry, origin: str) -> Section:
    device = part.layout.device if part.layout.device != "any" else None
    section = from_config(part.config, origin, device)
    if section.rules:
        return section
    # one config for every linear layer but these
    left_out = (
        RecipeRule(tensor.name, Choice(None))
        for tensor in part.tensors
        if tensor.action in ("cast", "keep") and len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    )
    return Section(section.default, tuple(left_out))


def from_config(config: Mapping[str, Any], origin: str, layout_device: str | None = None) -> Section:
    """The rules that a torchao config makes (as ``torchao.core.config.config_to_dict`` gives it).

    An ``FqnToConfig`` leaves alone what it does not name; any other config is for all linear layers.

    Args:
        config: the config.
        origin: name of the file that it is from, for messages.
        layout_device: device type that packed weights are for, where the config does not say.

    Raises:
        UsageError: a config that no scheme makes.
    """
    try:
        check_quantization(config)
    except ValueError as error:
        raise UsageError(f"{origin}: {error}", hint=_NO_RECIPE) from None
    if config.get("_type") not in ("FqnToConfig", "ModuleFqnToConfig"):
        return Section(scheme_of_config(config, layout_device, origin))
    data = config.get("_data")
    entries = (data.get("fqn_to_config") or data.get("module_fqn_to_config")) if isinstance(data, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UsageError(f"{origin}: its FqnToConfig is empty")
    choices = {
        pattern: Choice(None) if entry is None else scheme_of_config(entry, layout_device, origin)
        for pattern, entry in entries.items()
    }
    default = choices.pop("_default", Choice(None))
    for pattern in choices:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except (re.error, RecursionError, OverflowError) as error:
                raise UsageError(f"{origin}: {pattern!r} is not a regular expression: {error}") from None
    return Section(default, tuple(RecipeRule(pattern, choice) for pattern, choice in choices.items()))


def patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """The patterns of an ``FqnToConfig`` and the config of each, ``None`` where it leaves alone; else nothing."""
    data = config.get("_data")
    if str(config.get("_type")) not in ("FqnToConfig", "ModuleFqnToConfig") or not isinstance(data, Mapping):
        return
    for name in ("fqn_to_config", "module_fqn_to_config"):
        if isinstance(found := data.get(name), Mapping) and found:
            for pattern, inner in found.items():
                yield pattern, inner if isinstance(inner, Mapping) else None
            return


def rule_schemes(config: Mapping[str, Any], layout_device: str | None) -> Iterator[tuple[str, str | None]]:
    """The patterns of an ``FqnToConfig`` and the scheme of each, ``None`` where it leaves alone.

    Args:
        config: as for :func:`from_config`; one that no scheme makes is left out.
        layout_device: device type that packed weights are for, where the config does not say.
    """
    for pattern, inner in patterns(config):
        with contextlib.suppress(UsageError):
            yield pattern, None if inner is None else scheme_of_config(inner, layout_device).scheme


def scheme_of_config(
    config: Mapping[str, Any], layout_device: str | None = None, origin: str = "the torchao config"
) -> Choice:
    """The scheme and its options that make a torchao config.

    Args:
        config: as ``torchao.core.config.config_to_dict`` gives it; older versions of a class are taken as torchao here
            reads them.
        layout_device: device type that packed weights are for, where the config does not say.
        origin: where the config is from, for messages.

    Raises:
        UsageError: torchao cannot read it, or no scheme makes it.
    """
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f"{origin}: not a torchao config") from None
    try:
        return _scheme_of_config(text, layout_device)
    except UsageError as error:
        raise UsageError(f"{origin}: {error.message}", hint=error.hint) from None


@cache
def _scheme_of_config(text: str, layout_device: str | None) -> Choice:
    values = json.loads(text)
    name = values.get("_type") if isinstance(values, dict) else None
    unknown = UsageError(f"no scheme makes the torchao config {name}", hint="'aoconvert schemes' lists the schemes")
    if not isinstance(name, str) or name not in {entry.config_class for entry in (*catalogue(), *INT4.values())}:
        raise unknown
    config = _read(values, name)
    for choice in sorted(_candidates(config, layout_device), key=lambda choice: len(choice.settings)):
        if (scheme := _make(choice)) is not None and _as_dict(scheme.config) == _as_dict(config):
            return choice
    raise unknown


def _read(values: Any, name: str) -> Any:
    """The config itself, as the torchao that is installed reads it."""
    import_torchao()
    from torchao.core.config import AOBaseConfig, config_from_dict

    try:
        with quiet_imports(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a version that it converts
            config = config_from_dict(values)
    except Exception as error:  # any class may fail in its own way on bad fields
        raise UsageError(f"torchao cannot read this {name}: {' '.join(str(error).split())}") from None
    if not isinstance(config, AOBaseConfig):
        raise UsageError(f"{name} is not a torchao config")
    return config


def _as_dict(config: Any) -> dict[str, Any]:
    """What the config says about the result: compiler flags left out."""
    from torchao.core.config import config_to_dict

    values: dict[str, Any] = config_to_dict(config)
    values["_data"].pop("set_inductor_config", None)
    return values


def _make(choice: Choice) -> Scheme | None:
    from aoconvert import schemes

    try:
        return schemes.get(
            str(choice.scheme),
            group_size=choice.group_size,
            settings=dict(choice.settings),
            layout_device=choice.layout_device,
        )
    except AoconvertError:
        return None


def _candidates(config: Any, layout_device: str | None) -> Iterator[Choice]:
    """Every scheme of the config's class, with the settings that differ from what its name gives."""
    if type(config).__name__ == INT4["cpu"].config_class:
        device = _INT4_DEVICES.get(_text(config.int4_packing_format) or "")
        algorithm = _text(config.int4_choose_qparams_algorithm) or ""
        if device is not None and isinstance(config.group_size, int):
            settings = () if algorithm == "TINYGEMM" else (("int4_choose_qparams_algorithm", algorithm),)
            plain = device == "cpu" and layout_device == "plain"
            yield Choice("int4wo", config.group_size, settings, "plain" if plain else device)
        return
    for entry in catalogue():
        dtype = dict(entry.fields).get("weight_dtype")
        if entry.config_class != type(config).__name__ or dtype not in (
            None,
            _text(getattr(config, "weight_dtype", None)),
        ):
            continue
        if (found := _of_entry(entry, config)) is not None:
            yield found


def _of_entry(entry: SchemeEntry, config: Any) -> Choice | None:
    """``None`` where the name fixes a field at another value."""
    base = _make(Choice(entry.name))
    if base is None:
        return None
    fixed = {key for key, _ in entry.fields}
    group_size = None
    settings = []
    for key, value in vars(config).items():
        if key in ("version", "set_inductor_config") or value == getattr(base.config, key):
            continue
        if key in fixed or (text := _text(value)) is None:
            return None
        size = getattr(value, "group_size", value if isinstance(value, int) else None)
        if key == entry.group_field and size is not None:
            group_size = size
        else:
            settings.append((key, text))
    return Choice(entry.name, group_size, tuple(settings))


def _text(value: Any) -> str | None:
    """A field's value in the syntax of ``--set``; ``None`` where it has none."""
    import torch

    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return str(value).lower()
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, list | tuple):
        parts = [_text(part) for part in value]
        return None if None in parts else ",".join(map(str, parts))
    kind = type(value).__name__
    if kind in ("PerRow", "PerTensor"):
        return "per_row" if kind == "PerRow" else "per_tensor"
    if kind in ("PerGroup", "PerAxis"):
        return f"per_group:{value.group_size}" if kind == "PerGroup" else f"per_axis:{value.axis}"
    if kind == "PerBlock":
        return "per_block:" + "x".join(map(str, value.block_size))
    return None
