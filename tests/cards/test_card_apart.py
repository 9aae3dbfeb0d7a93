"""A card names what did not go the usual way, each with its reason: nothing is lost in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from editing import edit
from reading import Page, read

from aoconvert.cards import CardOptions, render


def rows(page: Page, what: str) -> list[list[str]]:
    lines = [line for line in page.body.splitlines() if line.startswith(f"| {what} |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")][1:] for line in lines]


def change(values: dict[str, Any], layers: int = 2) -> None:
    part = values["components"][0]
    plain = next(tensor for tensor in part["tensors"] if tensor["action"] != "quantize")
    for number in range(layers):
        reason = "the model class does not know it"
        for name in ("eh_proj", "norm"):
            carried = {**plain, "action": "carry", "name": f"mtp.{number}.{name}.weight", "reason": reason}
            part["tensors"].append(carried)
    part["missing"] = [{"name": "pos.weight", "reason": "the library makes it from the config"}]
    part["dropped"] = [{"name": "ema.decay", "reason": "not a tensor"}]
    values["left_behind"] = [
        {"path": f"vae/old.{kind}", "reason": "weights in another format"} for kind in ("h5", "onnx")
    ]


def test_each_is_named_with_its_reason(pipeline: Path) -> None:
    edit(pipeline, change)
    page = read(render(pipeline, CardOptions()).text)
    assert rows(page, "carried over") == [
        ["`mtp.*.eh_proj.weight`", "2", "the model class does not know it"],
        ["`mtp.*.norm.weight`", "2", "the model class does not know it"],
    ]
    assert rows(page, "not in the files") == [["`pos.weight`", "1", "the library makes it from the config"]]
    assert rows(page, "left out") == [["`ema.decay`", "1", "not a tensor"]]
    assert [row[0] for row in rows(page, "not copied")] == ["`vae/old.h5`", "`vae/old.onnx`"]
    parts = {row[0]: row[2] for row in rows(page, "unchanged")}
    assert parts["`text_encoder`"] == "T5EncoderModel, its tensors bit for bit" and "`vae`" in parts
    assert "the model class does not know mtp.0.eh_proj.weight" in page.shown
    assert "Carried over, missing" not in page.html


def test_a_long_list_is_folded(pipeline: Path) -> None:
    def many(values: dict[str, Any]) -> None:
        change(values, 200)
        values["left_behind"] = [{"path": f"a{number}/b{number}.h5", "reason": "weights"} for number in range(500)]

    edit(pipeline, many)
    card = render(pipeline, CardOptions())
    page = read(card.text)
    assert any("Carried over, missing, unchanged or not copied" in line for line in page.html)
    assert rows(page, "carried over")[0][1] == "200"
    assert rows(page, "not copied")[-1] == ["`and 300 more`", "300", "all are in aoconvert.json"]
    assert len(card.text) < 40_000


@pytest.mark.parametrize("name", ["llama-chat"])
def test_where_all_went_the_usual_way_there_is_no_table(name: str, converted: Any) -> None:
    page = read(render(converted(name), CardOptions()).text)
    assert not any(rows(page, what) for what in ("carried over", "not in the files", "left out", "unchanged"))
    assert "the model class does not know" not in page.shown
