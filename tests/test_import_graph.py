"""Packages import from packages below them only, and no module imports itself by way of others."""

from __future__ import annotations

from pathlib import Path

import pytest
from import_graph import Arrow, arrows, by_part, cycles, upward

PACKAGE = Path(__file__).parents[1] / "aoconvert"

# packages and modules directly in aoconvert/, from top to bottom; ``__init__`` is aoconvert itself
ORDER = (
    *("__main__", "cli", "documents", "demo", "__init__", "api"),
    *("hub", "cards", "inspection", "verification", "repacking", "searching", "engine"),
    *("planning", "recipes", "rules", "models", "inputs", "schemes", "readers", "writers", "sources"),
    *("staging", "manifest", "entries", "options", "hashing", "environment", "cache", "json_text", "files"),
    *("seals", "words", "accelerators", "memory", "progress", "version", "errors"),
)

# what is not so yet. An entry that is no longer true has to go
UPWARD = [
    ("aoconvert.engine.resume", "aoconvert.formats.torch_bin.safe_names"),
    ("aoconvert.formats.torch_bin.reader", "aoconvert.formats.torch_bin.contents"),
    ("aoconvert.formats.torch_bin.reader", "aoconvert.formats.torch_bin.header"),
    ("aoconvert.recipes.foreign_configs", "aoconvert.formats.torch_bin.safe_names"),
    ("aoconvert.rewriting.repack_plan", "aoconvert.formats.torch_bin.header"),
    ("aoconvert.rewriting.repack", "aoconvert.checkpoint.checkpoint"),
    ("aoconvert.rewriting.stored", "aoconvert.formats.torch_bin.contents"),
    ("aoconvert.rewriting.stored", "aoconvert.formats.torch_bin.header"),
    ("aoconvert.verification.load_device", "aoconvert.inspection.compat"),
    ("aoconvert.verification.load_device", "aoconvert.inspection.demands"),
]


@pytest.fixture(scope="module")
def found() -> frozenset[Arrow]:
    return arrows(PACKAGE)


def test_arrows_go_down(found: frozenset[Arrow]) -> None:
    assert [(arrow.source, arrow.target) for arrow in upward(found, ORDER)] == UPWARD


def test_no_module_imports_itself_by_way_of_others(found: frozenset[Arrow]) -> None:
    assert cycles(found) == []


def test_the_order_has_no_more_than_there_is() -> None:
    here = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert sorted(ORDER) == sorted(here)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A package of two packages and a module; the arrows of all go down."""
    files = {
        "__init__.py": "from small.high import b\n",
        "errors.py": "import ast\n",
        "high/__init__.py": "",
        "high/b.py": "from ..low import a, other\nfrom small import errors\n",
        "low/__init__.py": "other = 1\n",
        "low/a.py": "from small.errors import Error\n",
    }
    for name, text in files.items():
        path = tmp_path / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "small"


SMALL = ("__init__", "high", "low", "errors")


def test_imports_are_found(small: Path) -> None:
    assert arrows(small) == {
        Arrow("small", "small.high.b"),
        Arrow("small.high.b", "small.low.a"),
        Arrow("small.high.b", "small.low"),
        Arrow("small.high.b", "small.errors"),
        Arrow("small.low.a", "small.errors"),
    }
    assert upward(arrows(small), SMALL) == cycles(arrows(small)) == cycles(by_part(arrows(small))) == []


@pytest.mark.parametrize(
    ("text", "typing"),
    [
        ("from small.high import b\n", False),
        ("import small.high.b as c\n", False),
        ("from ..high.b import something\n", False),
        ("def function():\n    for _ in ():\n        from small.high import b\n", False),
        ("try:\n    pass\nexcept ImportError:\n    import small.high.b\n", False),
        ("if TYPE_CHECKING:\n    from small.high import b\n", True),
        ("if typing.TYPE_CHECKING:\n    pass\nelse:\n    from small.high import b\n", False),
        ("if TYPE_CHECKING:\n    from small.high import b\ndef function():\n    import small.high.b\n", False),
    ],
)
def test_an_upward_import_is_seen_wherever_it_stands(small: Path, text: str, typing: bool) -> None:
    with (small / "low" / "a.py").open("a") as file:
        file.write(text)
    found = arrows(small)
    assert upward(found, SMALL) == [Arrow("small.low.a", "small.high.b", typing)]
    assert cycles(found) == [{"small.high.b", "small.low.a"}]
    assert cycles(by_part(found)) == [{"high", "low"}]
    assert bool(cycles(arrow for arrow in found if not arrow.typing)) is not typing


def test_a_package_without_a_place_is_named(small: Path) -> None:
    with pytest.raises(ValueError, match="not in the order of packages: low"):
        upward(arrows(small), ("__init__", "high", "errors"))
