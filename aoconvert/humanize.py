"""Numbers, names and lists for people."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal


def size(count: float) -> str:
    """Bytes, in powers of ten: ``3.39 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def number(value: float) -> str:
    """A number of parameters: ``384``, ``9.22 k``, ``1.69 B``."""
    for unit in ("", " k", " M"):
        if abs(value) < 1000:
            return f"{value:.0f}" if not unit else f"{value:.2f}{unit}"
        value /= 1000
    return f"{value:.2f} B"


def rounded(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, never with an exponent: ``6,210``, ``0.0000938``."""
    return format(Decimal(f"{value:.{digits}g}"), ",f")


_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def duration(seconds: float, *limits: float) -> str:
    """A time, and the lowest and highest in its unit: ``5.16 ms``, ``5.16 ms (4.47 to 9.81)``."""
    unit, scale = next((item for item in _SECONDS if seconds >= item[1]), _SECONDS[-1])
    spread = f" ({' to '.join(rounded(limit / scale) for limit in limits)})" if limits else ""
    return f"{rounded(seconds / scale)} {unit}{spread}"


def percent(fraction: float) -> str:
    """A fraction, never rounded up to all or down to nothing: ``99.1 %``, ``> 99.9 %``."""
    if 0.9995 <= fraction < 1:
        return "> 99.9 %"
    if 0 < fraction < 0.0005:
        return "< 0.1 %"
    return f"{fraction:.1%}".replace("%", " %").replace(".0 %", " %")


def plural(count: int, word: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


_SPOKEN = "AEFHILMNORSX"
"""Letters whose names begin with the sound of a vowel."""


def with_article(name: str) -> str:
    """A class name after its article: ``a BertModel``, ``an OPTForCausalLM``, ``an SD3Transformer2DModel``, ``a UNet``.

    Two capitals, or a capital and a digit, are spoken letter by letter.
    """
    spelled = name[:1].isupper() and (name[1:2].isupper() or name[1:2].isdigit())
    vowels = _SPOKEN if spelled else "AEIOaeio"
    return f"{'an' if name[:1] and name[0] in vowels else 'a'} {name}"


def first(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names: ``a, b, c and 7 more``."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def argument(place: str) -> str:
    """A path as a command takes it: one that begins with a hyphen would be an option."""
    return f"./{place}" if place.startswith("-") else place


def escape(line: str) -> str:
    """A line fit for a terminal: what cannot be printed is shown as its escape, such as ``\\x1b`` or ``\\u202e``."""
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
