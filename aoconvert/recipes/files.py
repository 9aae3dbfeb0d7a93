"""Recipe files: TOML that people write, or what an earlier result says about itself.

::

    default = "int8wo"                     # or "skip", or a table; without it --scheme is the default

    [[rule]]
    match = 're:transformer_blocks\\..*\\.attn1\\.to_[qkv]'
    scheme = "int4wo"                      # or "skip"
    group_size = 64
    layout_device = "cuda"
    set = { int4_choose_qparams_algorithm = "hqq" }

    [component.text_encoder]               # holds alone for this component of a pipeline
    default = { scheme = "float8wo" }

Which rule is for a tensor: an exact tensor name, an exact module name, the first ``re:`` that matches the tensor's name
fully, the first that matches the module's, the default (torchao's ``FqnToConfig``, see :mod:`aoconvert.recipes.rules`).
"""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from aoconvert.checkpoint.manifest import MOST_BYTES
from aoconvert.errors import UsageError
from aoconvert.recipes.base import Choice, Recipe, RecipeRule, Section, at
from aoconvert.recipes.recorded import from_json
from aoconvert.schemes.names import find

SKIP = "skip"
_REGEX = "re:"
_LIMIT = 64 << 20  # bytes; a manifest can be larger
_STEP = 1 << 20


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Choice(_Model):
    scheme: StrictStr
    group_size: StrictInt | None = None
    set: dict[str, StrictBool | StrictInt | StrictFloat | StrictStr] = Field(default_factory=dict)
    layout_device: StrictStr | None = None


class _Rule(_Choice):
    match: StrictStr


class _Section(_Model):
    default: Any = None  # a name or a table: told apart by hand, for one message instead of two
    rule: list[_Rule] = Field(default_factory=list)


class _File(_Section):
    component: dict[str, _Section] = Field(default_factory=dict)


def load(path: Path) -> Recipe:
    """Read a recipe: a TOML file, or the ``config.json`` or ``aoconvert.json`` of an earlier result.

    Raises:
        UsageError: the file cannot be read, or something in it is wrong.
    """
    is_json = path.suffix.lower() == ".json"
    content = _read(path, MOST_BYTES if is_json else _LIMIT)
    if is_json:
        return from_json(content, path.name)
    try:
        values = tomllib.loads(content.decode().replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path} is not UTF-8 (byte {error.start})") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"recipe {path} is not TOML: {error}", hint="put strings and patterns in quotes") from error
    return _recipe(values, path.name)


def _read(path: Path, most: int) -> bytearray:
    """The content, without the byte order mark that some editors write."""
    content = bytearray()
    try:
        with path.open("rb") as file:
            while len(content) <= most and (more := file.read(_STEP)):  # a pipe does not say how much it has
                content += more
    except OSError as error:
        hint = "give a .toml, a config.json or an aoconvert.json" if path.is_dir() else None
        raise UsageError(f"recipe {path}: {error.strerror or error}", hint=hint) from error
    if len(content) > most:
        raise UsageError(f"recipe {path} is larger than {most >> 20} MiB", hint="a recipe holds rules, not weights")
    if content.startswith(codecs.BOM_UTF8):
        del content[: len(codecs.BOM_UTF8)]
    return content


def _recipe(values: Mapping[str, Any], origin: str) -> Recipe:
    try:
        parsed = _File.model_validate(values)
    except ValidationError as error:
        raise _explain(error, origin) from None
    components = {name: _section(part, origin, f"{_component(name)} ") for name, part in parsed.component.items()}
    recipe = Recipe(origin, _section(parsed, origin, ""), components)
    if recipe.base == Section() and not components:
        raise UsageError(f"{origin} has neither a default nor rules", hint='add default = "int8wo", or a [[rule]]')
    return recipe


def _section(parsed: _Section, origin: str, prefix: str) -> Section:
    default = None
    if isinstance(parsed.default, str):
        default = _choice(_Choice(scheme=parsed.default), origin, f"{prefix}default")
    elif isinstance(parsed.default, dict):
        try:
            default = _choice(_Choice.model_validate(parsed.default), origin, f"{prefix}default")
        except ValidationError as error:
            raise _explain(error, origin, f"{prefix}default", "default") from None
    elif parsed.default is not None:
        raise UsageError(
            f"{origin}, {prefix}default: {parsed.default!r} is neither a scheme nor a table",
            hint='default = "int8wo", or default = { scheme = "int4wo", group_size = 64 }',
        )
    made: dict[str, int] = {}
    rules = []
    for number, rule in enumerate(parsed.rule, 1):
        place = f"{prefix}rule {number} ({rule.match!r})"
        _check_pattern(rule.match, origin, place)
        if (first := made.setdefault(rule.match, number)) != number:
            raise UsageError(f"{origin}, {place}: rule {first} has the same pattern", hint="remove one of them")
        rules.append(RecipeRule(rule.match, _choice(rule, origin, place)))
    return Section(default, tuple(rules))


def _check_pattern(pattern: str, origin: str, place: str) -> None:
    if pattern == "_default":
        raise UsageError(f"{origin}, {place}: _default is not a pattern", hint='write default = "int8wo"')
    if not pattern.removeprefix(_REGEX):
        raise UsageError(f"{origin}, {place}: an empty pattern", hint="name a tensor or module, or write re:PATTERN")
    if pattern.startswith(_REGEX):
        try:
            re.compile(pattern[len(_REGEX) :])
        except (re.error, RecursionError, OverflowError) as error:
            hint = "in 'single quotes' a backslash is literal"
            raise UsageError(f"{origin}, {place}: not a regular expression: {error}", hint=hint) from None


def _choice(parsed: _Choice, origin: str, place: str) -> Choice:
    settings = tuple((key, _text(value)) for key, value in parsed.set.items())
    if parsed.layout_device == "":
        raise UsageError(f"{origin}, {place}: layout_device is empty", hint="use cpu, cuda or xpu, or omit it")
    if parsed.scheme.strip().lower() == SKIP:
        if settings or parsed.group_size is not None or parsed.layout_device is not None:
            raise UsageError(f'{origin}, {place}: scheme "skip" takes no options', hint="name a scheme, or omit them")
        return Choice(None)
    try:
        find(parsed.scheme, dict(settings))
    except UsageError as error:
        raise at(origin, place, error) from error
    return Choice(parsed.scheme, parsed.group_size, settings, parsed.layout_device)


def _text(value: bool | int | float | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _component(name: str) -> str:
    return f"[component.{name if name.isprintable() else repr(name)}]"


_KEYS = {
    "file": "a recipe has default, [[rule]] and [component.NAME]",
    "section": "a component has default and [[component.NAME.rule]]",
    "rule": "a rule has match, scheme, group_size, layout_device and set",
    "default": "a default has scheme, group_size, layout_device and set",
}


_TYPES = {
    "dict_type": "a table",
    "model_type": "a table",
    "list_type": "a list of tables",
    "int_type": "a whole number",
    "string_type": "text",
}


def _explain(error: ValidationError, origin: str, place: str = "", kind: str = "file") -> UsageError:
    """The first thing that is wrong, with its place in words."""
    first = error.errors()[0]
    keys = list(first["loc"])
    places = [origin, place] if place else [origin]
    if keys[0] == "component" and len(keys) > 1:
        places.append(_component(str(keys[1])))
        keys, kind = keys[2:], "section"
    if len(keys) > 1 and keys[0] == "rule":
        places.append(f"rule {int(keys[1]) + 1}")
        keys, kind = keys[2:], "rule"
    in_set = len(keys) > 1 and keys[0] == "set"
    key = ".".join(map(str, keys[:2] if in_set else keys))
    if first["type"] == "extra_forbidden":
        what = f"unknown key {key!r}"
    elif first["type"] == "missing":
        what = f"{key} is missing"
    elif in_set:
        what = f"{key} is neither text nor a number nor true or false"
    else:
        what = f"{key} should be {_TYPES.get(first['type'], 'something else')}".lstrip()
    return UsageError(f"{', '.join(places)}: {what}", hint=_KEYS[kind])
