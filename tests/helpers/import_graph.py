"""Which module of a package imports which, read off the source with ``ast``: nothing is imported to find out."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Arrow:
    """``source`` imports ``target``, both full names of modules; ``typing`` where only a type checker sees it."""

    source: str
    target: str
    typing: bool = False


def arrows(root: Path) -> frozenset[Arrow]:
    """Every import between modules under ``root``, the folder of a package; imports inside of functions count.

    ``from package import name`` goes to the module ``package.name`` where there is one, to ``package`` otherwise.
    """
    modules = dict(_modules(root))
    found = set()
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for statement, typing in _imports(ast.parse(path.read_text(encoding="utf-8")), False):
            for target in _targets(statement, package, modules):
                if target != name:
                    found.add(Arrow(name, target, typing))
    return frozenset(arrow for arrow in found if not (arrow.typing and Arrow(arrow.source, arrow.target) in found))


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(node: ast.AST, typing: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements below a node, and whether they stand under ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, typing
        elif isinstance(child, ast.If) and _type_checking(child.test):
            yield from _imports(ast.Module(child.body, []), True)
            yield from _imports(ast.Module(child.orelse, []), typing)
        else:
            yield from _imports(child, typing)


def _type_checking(test: ast.expr) -> bool:
    return (test.id if isinstance(test, ast.Name) else getattr(test, "attr", "")) == "TYPE_CHECKING"


def _targets(statement: ast.Import | ast.ImportFrom, package: str, modules: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        above = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
        base = ".".join([*above, *([statement.module] if statement.module else [])])
        names = [f"{base}.{alias.name}" for alias in statement.names]
        names = [name if name in modules else base for name in names]
    yield from (name for name in names if name in modules)


def part(module: str) -> str:
    """The package or the module directly under the root that a module is in; the root itself is ``__init__``."""
    return (*module.split("."), "__init__")[1]


def by_part(found: Iterable[Arrow]) -> frozenset[Arrow]:
    """The arrows between packages."""
    pairs = {(part(arrow.source), part(arrow.target), arrow.typing) for arrow in found}
    return frozenset(Arrow(*pair) for pair in pairs if pair[0] != pair[1])


def upward(found: Iterable[Arrow], order: Sequence[str]) -> list[Arrow]:
    """The arrows that go from a package to one that stands above it in ``order``, which is from top to bottom.

    Raises:
        ValueError: a package is not in ``order``.
    """
    place = {name: number for number, name in enumerate(order)}
    found = sorted(found)
    unknown = {part(name) for arrow in found for name in (arrow.source, arrow.target)} - place.keys()
    if unknown:
        raise ValueError(f"not in the order of packages: {', '.join(sorted(unknown))}")
    return [arrow for arrow in found if place[part(arrow.target)] < place[part(arrow.source)]]


def cycles(found: Iterable[Arrow]) -> list[frozenset[str]]:
    """The sets of two or more modules that all reach each other, the largest first."""
    graph: dict[str, set[str]] = {}
    for arrow in found:
        graph.setdefault(arrow.source, set()).add(arrow.target)
        graph.setdefault(arrow.target, set())
    reach = {name: _reachable(graph, name) for name in graph}
    knots = {frozenset(other for other in reach[name] if name in reach[other]) | {name} for name in graph}
    return sorted((knot for knot in knots if len(knot) > 1), key=lambda knot: (-len(knot), sorted(knot)))


def _reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for target in graph[left.pop()]:
            if target not in seen:
                seen.add(target)
                left.append(target)
    return seen
