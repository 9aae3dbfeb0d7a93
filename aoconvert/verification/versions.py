"""Would this environment open the checkpoint? In plain words, before anything is loaded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from aoconvert.checkpoint.manifest import ComponentEntry
from aoconvert.environment import version_of
from aoconvert.schemes.table import INT4, catalogue

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

_LIBRARIES = ("torch", "torchao", "diffusers", "transformers", "accelerate")


@cache
def list_packages() -> Mapping[str, SpecifierSet]:
    """What a torchao checkpoint can need, and the versions that aoconvert itself asks for, by name."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    found = dict.fromkeys(_LIBRARIES, SpecifierSet())
    own = [Requirement(line) for line in importlib.metadata.requires("aoconvert") or ()]
    found |= {line.name: line.specifier for line in own if line.name in found and line.marker is None}
    for entry in (*catalogue(), *INT4.values()):
        for text in entry.requires:
            found.setdefault(Requirement(text).name, Requirement(text).specifier)
    return found


def version_problems(entry: ComponentEntry) -> list[str]:
    """What is too old here for a component, one line each."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import Version

    problems = []
    for package, wanted in entry.loads_with.items():
        if package not in list_packages():
            problems.append(f"the manifest requires the package {package!r}, which no torchao checkpoint needs")
            continue
        here = version_of(package)
        try:
            allowed = SpecifierSet(wanted)
        except InvalidSpecifier:
            problems.append(f"the manifest requires {package}{wanted}, which is not a version range")
            continue
        if here is None:
            problems.append(f"{package} is not installed; the checkpoint needs {package}{wanted}")
        elif not allowed.contains(Version(here).base_version, prereleases=True):
            problems.append(f"{package} {here} is installed; the checkpoint needs {package}{wanted}")
    return problems
