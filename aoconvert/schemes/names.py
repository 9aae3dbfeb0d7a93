"""From a name that users know to a catalogue entry, and a useful answer where there is none. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache

from packaging.requirements import Requirement

from aoconvert.environment import version_at_least, version_of
from aoconvert.errors import UnknownSchemeError, UsageError
from aoconvert.schemes.table import FAMILIES, MISSING, PRESETS, Family, SchemeEntry, catalogue

AUTO = "auto"


def normalize(name: str) -> str:
    """Names are compared without regard to case and to ``-`` or ``_``."""
    return name.strip().lower().replace("-", "_")


def find(name: str, settings: Mapping[str, str] | None = None) -> SchemeEntry:
    """The entry that ``name`` means; a family's name (``intx``) needs the setting that chooses among its schemes.

    Raises:
        UnknownSchemeError: no such scheme; the hint holds the nearest names, or what to take instead.
        UsageError: a family's name without the setting that it needs, or with an unknown value for it; ``auto``,
            which is many schemes.
    """
    key = normalize(name)
    if key == AUTO:
        raise UsageError(
            "auto is not a single scheme: it chooses one for each tensor",
            hint="only quantize and plan accept it; name a scheme, such as int8wo",
        )
    if (entry := _entries().get(key)) is not None:
        return entry
    if (preset := _presets().get(key)) is not None:
        return _entries()[preset[0]]
    for family in FAMILIES:
        if key in map(normalize, family.names):
            return _member(name, family, settings or {})
    for missing in MISSING:
        if match := re.fullmatch(missing.pattern, key):
            raise UnknownSchemeError(
                f"scheme {name!r} is {missing.reason}", hint=f"nearest that works: {match.expand(missing.nearest)}"
            )
    raise UnknownSchemeError(f"there is no scheme {name!r}", hint=_nearest(key))


def preset_group_size(name: str) -> int | None:
    """The group size that a name brings along (``int4wo-64``, ``quanto-int2``)."""
    preset = _presets().get(normalize(name))
    return preset[1] if preset is not None else None


def availability(scheme: str | SchemeEntry) -> str | None:
    """Why a scheme cannot quantize here (``needs torchao>=0.18, here is 0.17.0``), else ``None``. Imports no torch.

    Raises:
        UsageError: as :func:`find`, for a name.
    """
    entry = find(scheme) if isinstance(scheme, str) else scheme
    for text in entry.requires:
        requirement = Requirement(text)
        if not all(version_at_least(requirement.name, bound.version) for bound in requirement.specifier):
            version = version_of(requirement.name)
            return f"needs {text}, " + (f"here is {version}" if version else "which is not installed")
    return None


@cache
def _entries() -> dict[str, SchemeEntry]:
    """Normalized name -> entry. A name that two entries claim is a mistake in the table."""
    found: dict[str, SchemeEntry] = {}
    for entry in catalogue():
        for name in (entry.name, *entry.aliases):
            if found.setdefault(normalize(name), entry) is not entry:
                raise AssertionError(f"{name} means both {found[normalize(name)].name} and {entry.name}")
    return found


@cache
def _presets() -> dict[str, tuple[str, int]]:
    """Normalized name -> canonical name and group size."""
    return {preset.name: (preset.scheme, preset.group_size) for preset in PRESETS}


def _member(name: str, family: Family, settings: Mapping[str, str]) -> SchemeEntry:
    members = dict(family.members)
    value = settings.get(family.field)
    chosen = family.default if value is None else members.get(normalize(value).removeprefix("torch."))
    if chosen is not None:
        return _entries()[chosen]
    schemes = ", ".join(members.values())
    if value is None:
        example = f"{family.field}={next(iter(members))}"
        raise UsageError(f"{name!r} does not specify the {family.field}", hint=f"use {schemes}, or --set {example}")
    raise UsageError(f"{name!r} has no variant with {family.field}={value!r}", hint=f"choose from {', '.join(members)}")


def _nearest(key: str) -> str:
    """The schemes whose names or aliases look like ``key``, best first."""
    names = {name: entry.name for name, entry in _entries().items()}
    names |= {normalize(name): name for family in FAMILIES for name in family.names}
    begun = [name for name in names if len(key) > 1 and name.startswith(key)]
    close = difflib.get_close_matches(key, names, n=6, cutoff=0.6)
    found = list(dict.fromkeys(names[name] for name in (*begun, *close)))[:3]
    listing = "'aoconvert schemes' lists all"
    return f"did you mean {' or '.join(found)}? {listing}" if found else listing
