"""A picture of several results: every one is at its place and named, or it is said why it is not there."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cards.test_picture import check
from cli.conftest import call
from helpers.benches import NOTHING, write_bench, write_eval
from helpers.documents import check_document

import aoconvert.api
from aoconvert.cards.comparable import Diagram, Mark
from aoconvert.cards.plot import draw_diagrams

__all__ = ["call"]

Call = Callable[..., Any]


@pytest.fixture
def three(converted: Any, tmp_path: Path) -> list[Path]:
    """The same result under three names."""
    names = ("int8", "int<4>&", "float8")
    return [Path(shutil.copytree(converted("llama-chat"), tmp_path / name)) for name in names]


def dots(root: ElementTree.Element) -> list[tuple[float, float]]:
    paths = [element.attrib["d"] for element in root.iter() if element.attrib.get("stroke-width") == "11"]
    found = [re.fullmatch(r"M([\d.]+) ([\d.]+)h0", path) for path in paths]
    return [(float(one[1]), float(one[2])) for one in found if one is not None]


def words(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if element.tag.endswith("text")]


def test_errors_and_times(call: Call, three: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(three):
        row = {"model_bytes": 1_000_000 * (number + 1), "seconds": 0.1, "per_second": 10 / (number + 1)}
        write_bench(folder, {"batch_size": 7}, row, {**row, "model": "source", "scheme": "bfloat16"})
        write_eval(folder, kl_mean=0.01 * (number + 1), output_sqnr_db=20)
    done = call("bench", *three, "--plot", tmp_path / "out.svg", "--json")
    assert (done.code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    check_document("plot", found)
    named = [folder.name for folder in three]
    assert [diagram["results"] for diagram in found["diagrams"]] == [named, [*named, "original, bfloat16"]]
    assert found["left_out"] == []
    svg = (tmp_path / "out.svg").read_text()
    root = check(svg)
    assert {"KL divergence to the original, nats (lower is better)", *named} <= {*words(root)}
    assert "milliseconds per sentence (lower is better)" in words(root)
    places = dots(root)
    errors, times = places[:3], places[3:6]
    assert len({x for x, _ in errors}) == 1  # the same weights
    assert [y for _, y in errors] == sorted([y for _, y in errors], reverse=True)  # more error is higher
    assert [x for x, _ in times] == sorted(x for x, _ in times)
    assert [y for _, y in times] == sorted([y for _, y in times], reverse=True)


def test_what_is_not_comparable_is_said(call: Call, three: list[Path], tmp_path: Path) -> None:
    write_bench(three[0], {})
    write_bench(three[1], {"workload": "9 tokens"}, {"error": "no", **NOTHING})
    write_bench(three[2], {}, environment={"device": "cuda", "device_name": "A GPU"})
    write_eval(three[0], kl_mean=0.5)
    write_eval(three[1], kl_mean=0.5)
    write_eval(three[2], data="1" * 64, kl_mean=0.5)
    done = call("bench", *three, "--plot", tmp_path / "out.svg")
    assert done.code == 0
    assert "float8 is not in a diagram: its aoconvert.eval.json is of other data than the others'" in done.stderr
    assert len(re.findall("is not in a diagram: its aoconvert.bench.json has no row for", done.stderr)) == 2


def test_without_reports_nothing_is_drawn(call: Call, three: list[Path], tmp_path: Path) -> None:
    plot = tmp_path / "out.svg"
    write_bench(three[0], manifest_sha256="0" * 64)
    wrong: list[tuple[int, str, tuple[object, ...]]] = [
        (3, "no report of this checkpoint in", (three[0], three[1], "--plot", plot)),
        (3, "no such folder", (tmp_path / "absent", "--plot", plot)),
        (2, "must end in .svg", (three[0], "--plot", tmp_path / "out.png")),
        (2, "--plot needs folders with reports", ("--plot", plot)),
        (2, "--runs: --plot measures nothing", (three[0], "--runs", 3, "--plot", plot)),
        (2, "at most 10 results", (*[three[0]] * 13, "--plot", plot)),
        (2, "one checkpoint at a time", (three[0], three[1])),
    ]
    for code, message, arguments in wrong:
        done = call("bench", *arguments)
        assert (done.code, "Traceback" in done.stderr) == (code, False), (arguments, done)
        assert message in done.stderr, (arguments, done)
    write_bench(three[0], {"error": "no", **NOTHING})
    nothing = call("bench", three[0], "--plot", plot)
    assert nothing.code == 3 and "nothing to draw" in nothing.stderr
    assert not plot.exists()
    write_bench(three[0])
    with pytest.raises(aoconvert.WriteError):
        aoconvert.api.plot([three[0]], tmp_path / "absent" / "out.svg")


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_every_result_is_in_the_legend_once_and_nothing_leaves_the_picture(count: int) -> None:
    marks = tuple(Mark(f"a result with a long name {place}", 5e9 + place, 1.5, place) for place in range(count))
    diagram = Diagram("Size and error", "size", "error", (*marks, Mark("original", 1e9, 2.5, -1)), from_zero=True)
    root = check(draw_diagrams([diagram, diagram]))
    height = float(root.attrib["height"])
    names = [element for element in root.iter() if (element.text or "").startswith(("a result with", "original"))]
    names = [element for element in names if element.tag.endswith("text")]
    assert len(names) == count + 1
    for name in names:
        assert float(name.attrib["x"]) + 6.8 * len(name.text or "") < 840
    by_row: dict[str, list[float]] = {}
    for name in names:
        by_row.setdefault(name.attrib["y"], []).append(float(name.attrib["x"]))
    assert all(after - before > 160 for row in by_row.values() for before, after in pairwise(row))
    assert all(380 <= float(y) < height - 5 for y in by_row)
    looks = {
        (element.attrib["stroke"], element.attrib["stroke-width"])
        for element in root.iter()
        if element.attrib.get("stroke-width") == "11"
    }
    assert len(looks) == min(count, 5) + 1
    for x, y in dots(root):
        assert 0 < x < 840 and 0 < y < height
