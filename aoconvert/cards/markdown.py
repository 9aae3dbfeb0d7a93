"""Values of a manifest as Markdown: shown as they are, whatever is in them.

A name may hold backticks, pipes, newlines or HTML. Nothing here lets one of them become markup, in a table or outside:
https://spec.commonmark.org/0.31.2/ and https://github.github.com/gfm/ (a pipe ends a table's cell also inside a code
span, so it is written as an entity).
"""

from __future__ import annotations

import re

_LONGEST = 300  # characters of a value
_PLAIN_CODE = re.compile(r"[^`|\\&$]+")
# also where a line could begin with it; a colon before a space starts no address and no emoji
_MARKUP = re.compile(
    r"^ ?\d+[.)](?= |$)|^ ?[-+=]|[\\`*\[\]{}<>|~#!&$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?! |$)|(?<=www)\."
)
_BACKSLASH = frozenset("`*[]{}~#!_")  # the others are read again by tables, HTML filters or formulas: entities


class Md(str):
    """Text that is Markdown already; a template writes it as it is, and escapes every other text."""

    __slots__ = ()


def visible(value: object) -> str:
    """One line of printable characters, clipped; what cannot be printed is shown as its escape."""
    line = re.sub(r"\s+", " ", str(value)[: 4 * _LONGEST])
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def text(value: object) -> Md:
    """A value in running text or in a table's cell."""
    if isinstance(value, Md):
        return value
    return Md(_MARKUP.sub(_as_text, visible(value)))


def unbroken(value: object) -> Md:
    """A value in running text or in a table's cell, on one line."""
    return Md(text(value).replace(" ", "&nbsp;"))


def _as_text(found: re.Match[str]) -> str:
    before, last = found[0][:-1], found[0][-1]
    return before + (f"\\{last}" if last in _BACKSLASH else f"&#{ord(last)};")


def code(value: object) -> Md:
    """A value as code, in running text or in a table's cell."""
    shown = visible(value).strip()
    if _PLAIN_CODE.fullmatch(shown):
        return Md(f"`{shown}`")
    return Md("<code>" + re.sub(r"[^\w ./-]|_", lambda found: f"&#{ord(found[0])};", shown) + "</code>")


def block(value: str, language: str = "") -> Md:
    """Lines of code in a fence that they cannot close."""
    runs = [len(run) for run in re.findall(r"`+", value)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    return Md(f"{fence}{language}\n{value.rstrip()}\n{fence}")


def link(label: object, url: str) -> Md:
    """A link; only the text of it where ``url`` is no plain address of a page."""
    return Md(f"[{text(label)}]({url})") if is_page(url) else text(label)


def is_page(url: object) -> bool:
    """Whether it is an ``https`` address without anything that Markdown or HTML could read."""
    return isinstance(url, str) and re.fullmatch(r"https://[\w./%+~=@#-]+", url, re.ASCII) is not None
