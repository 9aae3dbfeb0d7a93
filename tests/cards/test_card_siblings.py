"""The card's table and picture of a release's variants, by a record that anybody may have written."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import build_llama
from reading import read

import aoconvert
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.release import Release, ReleasedModel, ReleasedVariant, VariantNeeds, read_release

SECTION = "## Other versions of this model"


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return aoconvert.quantize(build_llama(tmp_path / "model"), "int8wo", device="cpu", output=tmp_path / "out").output


def variant(name: str, model: str = "a", **values: Any) -> ReleasedVariant:
    given = {"scheme": name, "repo_id": f"me/{model}-{name}", "commit": "0" * 40, "size_bytes": 1000, **values}
    return ReleasedVariant(name=name, model=model, **given)


def write_record(folder: Path, *others: ReleasedVariant, **values: Any) -> None:
    own = variant("int8wo", manifest_sha256=file_sha256(folder / "aoconvert.json"), worst_sqnr_db=40.0, **values)
    models = tuple(ReleasedModel(name=name) for name in dict.fromkeys(each.model for each in (own, *others)))
    (folder / "release.json").write_bytes(Release(name="R", models=models, variants=(own, *others)).dump())


def rows_of(text: str) -> list[list[str]]:
    section = text.partition(SECTION)[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]


def test_siblings_are_a_table_a_picture_and_links(result: Path) -> None:
    write_record(result)
    alone = aoconvert.card(result)
    assert SECTION not in alone.text and alone.siblings is None

    needs = VariantNeeds(loads_with={"torchao": ">=0.15,<1", "evil": ">=1"}, devices=("cuda",), min_capability="8.9")
    eight = {"m": {"kl_mean": 0.01}, "n": {"kl_mean": 0.02}}
    four = variant(
        "int4", size_bytes=600, bits_per_weight=4.25, needs=needs, metrics={"m": {"kl_mean": 0.1}}, metrics_data="d"
    )
    other = variant("other-data", metrics={"m": {"kl_mean": 9.0}}, metrics_data="e", worst_sqnr_db=20.0)
    far = variant("x", model="b")
    write_record(
        result, four, other, far, variant("unpublished", model="b", commit=None), metrics=eight, metrics_data="d"
    )
    card = aoconvert.card(result)
    first, _, *rows = rows_of(card.text)
    assert first == ["", "scheme", "size", "bits per weight", "lowest SQNR", "KL divergence", "loads with"]
    assert rows == [
        ["**int8wo** (this one)", "`int8wo`", "1.00 kB", "", "40.0 dB", "0.02", ""],
        [
            "[int4](https://huggingface.co/me/a-int4)",
            "`int4`",
            "600 B",
            "4.2",
            "",
            "0.1",
            "torchao ≥ 0.15,&#60;1, cuda only, compute capability 8.9 or higher on CUDA",
        ],
        ["[other-data](https://huggingface.co/me/a-other-data)", "`other-data`", "1.00 kB", "", "20.0 dB", "", ""],
    ]
    # figures of eval on the same data are drawn, the others are not
    assert card.siblings is not None and ElementTree.fromstring(card.siblings) is not None
    assert "Size and error: int8wo (this one), int4</title>" in card.siblings and "KL divergence" in card.siblings
    assert "\nb: [x](https://huggingface.co/me/b-x).\n" in card.text
    assert {"R", "unpublished"}.isdisjoint(read(card.text).shown.split())

    # a record of other files is not this card's
    values = json.loads((result / "release.json").read_text())
    values["variants"][0]["manifest_sha256"] = "0" * 64
    (result / "release.json").write_text(json.dumps(values))
    assert SECTION not in aoconvert.card(result).text


def test_nothing_in_a_record_breaks_out(result: Path) -> None:
    bad = "](https://evil.example)<script>|`\n# x ![](http://evil.example/y.png) "
    needs = VariantNeeds(loads_with={bad: bad, "torchao": bad}, devices=(bad,), min_capability=bad)
    hostile = variant(bad, scheme=bad, needs=needs, worst_sqnr_db=-1e308, size_bytes=(1 << 62) - 1)
    far = variant(bad, model=bad, repo_id=bad)
    write_record(result)
    clean = read(aoconvert.card(result).text)
    write_record(result, hostile, far, repo_id=bad)
    card = aoconvert.card(result)
    page = read(card.text)
    assert page.links == clean.links
    assert {line for line in page.html - clean.html if "written by" not in line} <= {"<code>", "</code>"}
    assert set(page.headings) - set(clean.headings) == {"h2 Other versions of this model"}
    assert card.siblings is not None
    assert {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(card.siblings).iter()} == {
        "svg",
        "title",
        "style",
        "rect",
        "text",
        "path",
    }


@pytest.mark.parametrize("change", [{"size_bytes": -1}, {"size_bytes": 1 << 62}, {"worst_sqnr_db": 1e999}])
def test_a_record_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    values = {"schema_version": 1, "name": "x", "models": [], "variants": [{"name": "a", "model": "a", "scheme": "a"}]}
    (tmp_path / "release.json").write_text(json.dumps(values))
    assert read_release(tmp_path).name == "x"
    values["variants"] = [{"name": "a", "model": "a", "scheme": "a", **change}]
    (tmp_path / "release.json").write_text(json.dumps(values))
    with pytest.raises(ValueError):
        read_release(tmp_path)
