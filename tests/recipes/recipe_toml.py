"""Recipes written as TOML, so that what is read can be read again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from aoconvert.recipes import Choice, Recipe, Section

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dump(recipe: Recipe) -> str:
    """Write the recipe as TOML; :func:`aoconvert.recipes.load` reads the same out of it, except its origin."""
    lines = [*section_lines(recipe.base, "")]
    for name, section in recipe.components.items():
        key = f"component.{name if _BARE_KEY.fullmatch(name) else quote(name)}"
        lines += ["", f"[{key}]", *section_lines(section, f"{key}.")]
    return "\n".join(lines).strip() + "\n"


def section_lines(section: Section, prefix: str) -> Iterator[str]:
    if section.default is not None:
        pairs = list(pairs_of(section.default))
        only_scheme = len(pairs) == 1
        yield "default = " + (pairs[0][1] if only_scheme else f"{{ {', '.join(f'{k} = {v}' for k, v in pairs)} }}")
    for rule in section.rules:
        yield from ("", f"[[{prefix}rule]]", f"match = {quote(rule.pattern)}")
        yield from (f"{key} = {value}" for key, value in pairs_of(rule.choice))


def pairs_of(choice: Choice) -> Iterator[tuple[str, str]]:
    yield "scheme", quote(choice.scheme or "skip")
    if choice.group_size is not None:
        yield "group_size", str(choice.group_size)
    if choice.layout_device is not None:
        yield "layout_device", quote(choice.layout_device)
    if choice.settings:
        pairs = (f"{key if _BARE_KEY.fullmatch(key) else quote(key)} = {quote(text)}" for key, text in choice.settings)
        yield "set", f"{{ {', '.join(pairs)} }}"


def quote(text: str) -> str:
    """A TOML string: literal where it can be, so that a pattern looks as it is."""
    if "'" not in text and text.isprintable():
        return f"'{text}'" if "\\" in text or '"' in text else f'"{text}"'
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
