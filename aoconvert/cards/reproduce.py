"""What a card tells its reader to type: the command that makes the checkpoint again, and what to install.

Both are made of words of a manifest, which anybody may have written. Only what aoconvert itself can have written there
is shown: known options with values of their kind, the source and revision that the card names elsewhere, packages that
a torchao checkpoint can need.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from aoconvert.cards.metadata import is_repo_id
from aoconvert.checkpoint.manifest import MANIFEST_NAME, ComponentEntry, Manifest
from aoconvert.options import QuantizeOptions
from aoconvert.options.fields import SWITCH, options_of
from aoconvert.verification.versions import list_packages

# as they are typed
OPTIONS = {
    option.names(field)[-1]: option
    for field, option in options_of(QuantizeOptions).items()
    if option.recorded is not None
}
# what a recipe decides: where one was used, the manifest says all of it
_DECIDED = frozenset({"--scheme", "--group-size", "--set", "--skip"})
_SEARCHED = frozenset({"--candidates", "--target-bits", "--target-size", "--sensitivity"})


def make_again(manifest: Manifest) -> str | None:
    """The command that makes the checkpoint again, each word quoted; beside a copy of the manifest, if it names that.

    Returns:
        ``None`` where the manifest holds no conversion, or one that aoconvert cannot have written.
    """
    try:
        words = shlex.split(manifest.run.command)
    except ValueError:
        return None
    if words[:2] != ["aoconvert", "quantize"] or len(words) < 3:
        return None
    options = _options(words[3:])
    source = _source(manifest, words[2])
    if options is None or source is None:
        return None
    given = dict(options)
    if given.get("--revision", manifest.source.revision) != manifest.source.revision:
        return None
    if given.get("--subfolder", manifest.source.subfolder) != manifest.source.subfolder:
        return None
    if "--trust-remote-code" in given and not any(_runs_code(entry) for entry in manifest.components):
        return None
    if "--sensitivity" in given:  # that report is not published; what auto chose by it is in the manifest
        options = [*((name, value) for name, value in options if name not in _SEARCHED), ("--recipe", MANIFEST_NAME)]
        given = dict(options)
    if "--recipe" in given:
        options = [(name, value) for name, value in options if name not in _DECIDED]
    return shlex.join(["aoconvert", "quantize", source, *(word for option in options for word in option if word)])


def _runs_code(entry: ComponentEntry) -> bool:
    """Whether its class is code of the source: nobody is told to trust code for nothing."""
    return entry.load.kwargs.get("trust_remote_code") is True


def _source(manifest: Manifest, word: str) -> str | None:
    """The repo that the card names, or a folder that is plainly one."""
    if manifest.source.repo_id is not None:
        return word if word == manifest.source.repo_id and is_repo_id(word) else None
    if word.startswith("-"):  # an option: a folder of such a name is recorded with ./ before it
        return None
    name = word.removeprefix("./")
    return f"./{name}" if "/" not in name and name.isprintable() and name.lstrip(".") else None


def _options(words: Sequence[str]) -> list[tuple[str, str]] | None:
    """Options and their values (``""`` for flags); ``None`` where one is not known, or a value is none of its kind."""
    found, rest = [], iter(words)
    for name in rest:
        option = OPTIONS.get(name)
        if option is None:
            return None
        value = next(rest, "") if option.kind is not SWITCH else ""
        if name == "--recipe":  # the file that was given is not published, what it decided is
            value = MANIFEST_NAME
        if not option.shows(value):
            return None
        found.append((name, value))
    return found


def pin(package: str, version: str) -> str:
    """``package==version`` for pip; the name alone where it is none that can have made the checkpoint."""
    try:
        public = Version(version).public
    except InvalidVersion:
        return package
    known = list_packages().get(package)
    return f"{package}=={public}" if known is not None and known.contains(public, prereleases=True) else package


def parse_requirements(lines: Sequence[str]) -> Iterator[Requirement]:
    """Requirements of a layout, those on packages that a layout can need: names and least versions only."""
    for line in lines:
        try:
            found = Requirement(line)
        except InvalidRequirement:
            continue
        least = all(item.operator == ">=" for item in found.specifier)
        if found.name in list_packages() and least and found.url is None and not found.extras and found.marker is None:
            yield found


def ranges(loads_with: Mapping[str, str]) -> dict[str, str]:
    """What a component loads with, of packages that it can need, where a range is one."""
    found = {}
    for package, wanted in loads_with.items():
        try:
            SpecifierSet(wanted)
        except InvalidSpecifier:
            continue
        if package in list_packages():
            found[package] = wanted
    return found
