"""The table of schemes and families: bit-equal to torchao, opened by the library, used; and its summary in the README.

A choice that covers every scheme and every family runs by default, the rest is exhaustive. ``python
tests/table/run.py`` makes all of it in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from table import summary
from table.cells import FAMILIES, ROWS, Table
from table.run import quiet, stored

from aoconvert import schemes

# one family for every scheme, in turn, and what a mixture's experts take
COVERING = {(row, FAMILIES[number % len(FAMILIES)]) for number, row in enumerate(ROWS)}
COVERING |= {(row, "mixtral") for row in ("int8wo", "float8wo", "float8dq_row")}


def cells() -> Iterator[Any]:
    for family in FAMILIES:
        for row in ROWS:
            marks = () if (row, family) in COVERING else pytest.mark.exhaustive
            yield pytest.param(row, family, id=f"{family}-{row}", marks=marks)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    quiet()
    return Table(tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize(("row", "family"), cells())
def test_a_cell_is_what_the_table_says(row: str, family: str, table: Table) -> None:
    assert table.cell(row, family) == stored()[row][family]


def test_the_table_is_whole() -> None:
    found = stored()
    assert list(found) == list(ROWS)
    assert {row.partition("/")[0] for row in found} == {entry.name for entry in schemes.catalogue()}
    for columns in found.values():
        assert list(columns) == list(FAMILIES)
        for cell in columns.values():
            assert set(cell) == {"empty"} or set(cell) - {"experts", "imports", "because"} == {
                "equal",
                "quantized",
                "opens",
                "forward",
            }
            assert ("because" in cell) == (cell.get("opens") == "assign")


def test_the_readme_shows_the_tables_summary() -> None:
    """``python tests/table/summary.py --write`` puts it there."""
    text = summary.README.read_text(encoding="utf-8")
    assert summary.put(text, summary.block(stored())) == text
