"""Packages import from packages below them only, and no module imports itself by way of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.import_graph import Arrow, arrows, by_part, cycles, upward

PACKAGE = Path(__file__).parents[1] / "aoconvert"

PAGE = PACKAGE.parent / "ARCHITECTURE.md"


def order() -> list[str]:
    """What lies directly in aoconvert/, from top to bottom, as the page says."""
    table = PAGE.read_text().partition("<!-- order -->")[2].partition("<!-- /order -->")[0]
    return re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def found() -> frozenset[Arrow]:
    return arrows(PACKAGE)


def test_arrows_go_down(found: frozenset[Arrow]) -> None:
    assert upward(found, order()) == []


def test_no_module_imports_itself_by_way_of_others(found: frozenset[Arrow]) -> None:
    assert cycles(found) == []


def test_the_order_has_no_more_than_there_is() -> None:
    here = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert sorted(order()) == sorted(here)


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
