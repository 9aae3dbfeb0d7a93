"""Would this environment open the checkpoint? In plain words, before anything is loaded."""

from __future__ import annotations

from aoconvert.environment import version_of
from aoconvert.manifest import ComponentEntry


def version_problems(entry: ComponentEntry) -> list[str]:
    """What is too old here for a component, one line each."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import Version

    problems = []
    for package, wanted in entry.loads_with.items():
        here = version_of(package)
        try:
            allowed = SpecifierSet(wanted)
        except InvalidSpecifier:
            problems.append(f"the manifest wants {package}{wanted}, which is no version range")
            continue
        if here is None:
            problems.append(f"{package} is not installed; the checkpoint needs {package}{wanted}")
        elif not allowed.contains(Version(here).base_version, prereleases=True):
            problems.append(f"{package} {here} is here; the checkpoint needs {package}{wanted}")
    return problems
