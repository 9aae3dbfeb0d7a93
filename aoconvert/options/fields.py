"""One option, said once: ``field: Annotated[type, Option(...)] = default`` in a dataclass.

The option on the command line, the keyword argument, the recorded command and what a model card shows of it are made of
that. Imports neither click nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

from aoconvert.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_DIGITS = r"\d{1,12}(\.\d{1,12})?"
_WORD = r"\w[\w.,:+-]*"
PIXELS = r"[1-9]\d{0,4}x[1-9]\d{0,4}"
"""Width and height of a picture, as ``1024x768``: a regular expression."""


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``500MB``, ``2GiB`` or a plain number (powers of ten, like the Hub's tools).

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size", hint="write 5GB, 500MB or 2GiB")
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


def parse_pixels(text: str | None) -> tuple[int, int] | None:
    """Width and height from text that :data:`PIXELS` matches."""
    if text is None:
        return None
    width, _, height = text.partition("x")
    return int(width), int(height)


class Pictured:
    """Options with a ``size`` of images or videos."""

    size: str | None

    @property
    def width_and_height(self) -> tuple[int, int] | None:
        """Of images and videos, in pixels."""
        return parse_pixels(self.size)

    def check_size(self) -> None:
        """Refuse what is no size.

        Raises:
            UsageError: it is none.
        """
        if self.size is not None and not re.fullmatch(PIXELS, self.size, re.ASCII):
            raise UsageError(f"--size {self.size!r} is not WIDTHxHEIGHT", hint="e.g. --size 1024x768")


def _same(value: Any) -> Any:
    return value


def _size(value: int | str) -> int:
    return parse_size(value) if isinstance(value, str) else value


def _each(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    """``NAME,NAME``, or the names."""
    if not isinstance(value, str):
        return tuple(value)
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise UsageError(f"--candidates {value!r} has an empty name", hint="--candidates int4wo,int8wo")
    return names


def _settings(value: Mapping[str, str] | Iterable[str]) -> Mapping[str, str]:
    """``KEY=VALUE`` each."""
    if isinstance(value, Mapping):
        return value
    settings: dict[str, str] = {}
    for item in value:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {item!r} is not KEY=VALUE")
        if settings.setdefault(key, text) != text:
            raise UsageError(f"--set {key} is given twice, as {settings[key]!r} and {text!r}")
    return settings


def _components(value: str | Iterable[str] | Mapping[str, str | None]) -> Mapping[str, str | None]:
    """``NAME`` or ``NAME=SCHEME`` each."""
    if isinstance(value, Mapping):
        return value
    components: dict[str, str | None] = {}
    for item in _each(value):
        name, equals, scheme = item.partition("=")
        if not name or (equals and not scheme):
            raise UsageError(f"--component {item!r} is neither NAME nor NAME=SCHEME")
        if components.setdefault(name, scheme or None) != (scheme or None):
            raise UsageError(f"--component {name} is given twice, with different schemes")
    return components


def _counts(value: int | Iterable[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _paths(value: str | Path | Iterable[str | Path]) -> tuple[Path, ...]:
    return (Path(value),) if isinstance(value, (str, Path)) else tuple(map(Path, value))


def _one(value: Any) -> list[str]:
    return [str(value)]


@dataclass(frozen=True)
class Kind:
    """What values an option takes.

    Attributes:
        name: by which the command line knows the kind.
        pattern: the text of a value that a model card shows, as a regular expression for ASCII.
        read: a value as it is typed or given in Python → the field's. Raises UsageError.
        write: the field's value → as it is typed, one text for each time.
        choices: the only values, where they are few.
    """

    name: str
    pattern: str = _WORD
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], list[str]] = _one
    choices: tuple[str, ...] = ()


TEXT = Kind("text")
REFERENCE = Kind("reference", r"(\./)?\w[\w.-]*(/\w[\w.-]*)?(@[0-9a-f]{40})?", str)
COUNT = Kind("count", _DIGITS)
COUNTS = Kind("counts", _DIGITS, _counts, lambda value: [str(count) for count in value])
NUMBER = Kind("number", _DIGITS)
FRACTION = Kind("fraction", _DIGITS)
SIZE = Kind("size", _DIGITS + r"\w*", _size)
SWITCH = Kind("switch", "", write=lambda _: [])
FOLDER = Kind("folder", read=Path)
FILE = Kind("file", read=Path, write=lambda value: [value.name])
FILES = Kind("files", read=_paths, write=lambda value: [path.name for path in value])
NAMES = Kind("names", read=_names, write=lambda value: [",".join(value)])
PATTERNS = Kind("patterns", r"[^\x00-\x1f\x7f]+", _each, list)
LORAS = Kind("loras", r"(\./)?\w[\w.-]*(/\w[\w.-]*)*(@[0-9a-f]{40})?(@[-+.e\d]+)?", _each, list)
SETTINGS = Kind("settings", rf"\w+={_WORD}", _settings, lambda value: [f"{key}={text}" for key, text in value.items()])
COMPONENTS = Kind(
    "components",
    rf"\w+(={_WORD})?",
    _components,
    lambda value: [f"{name}={scheme}" if scheme else name for name, scheme in value.items()],
)


def choice(*values: str) -> Kind:
    """One of a few words."""
    return Kind("choice", choices=values)


@dataclass(frozen=True)
class Option:
    """How a field is given.

    Attributes:
        help: the line of ``--help``.
        kind: what values it takes; a ``SWITCH`` takes none.
        typed: its names on the command line, the long one last; by default ``--`` and the field's name.
        metavar: what ``--help`` calls the value.
        envvar: an environment variable that is read where the option is not given.
        show_default: whether ``--help`` names the default.
        recorded: the place in the recorded command, lowest first, then by the order of the fields; ``None`` for what
            does not change the bytes that are written, and is not recorded.
        pattern: as in ``Kind``, where a card shows other values than most of the kind.
        opposite: of a ``SWITCH``: what switches it off again.
    """

    help: str
    kind: Kind = TEXT
    typed: tuple[str, ...] = ()
    metavar: str | None = None
    envvar: str | None = None
    show_default: bool = False
    recorded: int | None = None
    pattern: str | None = None
    opposite: str | None = None

    def names(self, field: str) -> tuple[str, ...]:
        """As they are typed."""
        return self.typed or (f"--{field.replace('_', '-')}",)

    def shows(self, text: str) -> bool:
        """Whether a model card may show this value of the option, which anybody may have written."""
        return re.fullmatch(self.pattern or self.kind.pattern, text, re.ASCII) is not None


def options_of(cls: type[Any]) -> Mapping[str, Option]:
    """The options of a dataclass: field → option, in the order of the fields."""
    hints = get_type_hints(cls, include_extras=True)
    found = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in fields(cls)}
    return {name: option for name, notes in found.items() for option in notes if isinstance(option, Option)}


def defaults_of(cls: type[Any]) -> Mapping[str, Any]:
    """Field → default of the fields that have one."""
    made = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(cls)
    }
    return {name: value for name, value in made.items() if value is not MISSING}


def read_values(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a dataclass out of what was typed, or given as keyword arguments; ``None`` means the default.

    Raises:
        UsageError: a value is not of its kind.
    """
    known = options_of(cls)
    return {
        name: known[name].kind.read(value) if name in known else value
        for name, value in values.items()
        if value is not None
    }


def record(options: Any, decided: Mapping[str, Any]) -> list[str]:
    """The words of a command that gives these options again: those that are recorded and not as by default.

    Args:
        options: a dataclass with options.
        decided: field → value of what was decided in the run, in place of the option's.
    """
    known, defaults = options_of(type(options)), defaults_of(type(options))
    places = {name: option.recorded for name, option in known.items() if option.recorded is not None}
    words: list[str] = []
    for name in sorted(places, key=places.__getitem__):
        value = decided.get(name, getattr(options, name))
        if value is not None and value != defaults.get(name):
            words += _typed(known[name], known[name].names(name)[-1], value)
    return words


def _typed(option: Option, flag: str, value: Any) -> Sequence[str]:
    if option.kind is SWITCH:
        return [flag]
    return [word for text in option.kind.write(value) for word in (flag, text)]


SourceRevision: TypeAlias = Annotated[
    str | None, Option("Branch, tag or commit of the source. Default: the commit that was quantized.")
]
TrustRemoteCode: TypeAlias = Annotated[bool, Option("Run model code from the checkpoint and the source.", SWITCH)]
