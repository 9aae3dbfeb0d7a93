"""``release.html``: one file that needs no other, read by a parser and by a real browser."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import find_browser
from PIL import Image

from aoconvert.checkpoint.evaluation import GateResult
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.release import VariantNeeds
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.page import Page
from aoconvert.releasing.record import Failure, ModelRecord, Record, VariantRecord
from aoconvert.releasing.release_file import Model, ReleaseFile, Variant

SCHEMES = ("int8wo", "float8dq_row", "int4wo", "mixed-6bit")
NEEDS = VariantNeeds(loads_with={"torchao": ">=0.15", "diffusers": ">=0.36"}, devices=("cuda",), memory_bytes=7 << 30)
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def gate(name: str, limit: float, value: float) -> GateResult:
    kept = value <= limit if name.startswith("max-") else value >= limit
    return GateResult(name=name, limit=limit, value=value, passed=kept)


def variant(model: str, place: int, root: Path) -> VariantRecord:
    """One of the figures that a real release has."""
    scheme, errors, bits = SCHEMES[place], (41.2, 31.7, 18.4, 29.9), (8.1, 8.0, 4.3, 6.2)
    folder = root / f"{model}-{scheme}"
    folder.mkdir(parents=True)
    (folder / "aoconvert.json").write_text(f'"{model} {scheme}"')
    if place == 0:
        (folder / "eval.png").write_bytes(PIXEL)
    size = int(5.6e9 * bits[place] / 8 * (1 if model == "CogVideoX-5b" else 0.4))
    gates = (
        gate("verified", 1, 1),
        gate("min-sqnr-db", 20, errors[place]),
        gate("max-size", 12e9, size),
        gate("min-psnr", 25, errors[place] - 4),
    )
    missed = not all(each.passed for each in gates)
    where: dict[str, Any] = {} if missed else {"url": f"https://huggingface.co/me/{folder.name}", "commit": "0a1b" * 10}
    return VariantRecord(
        name=folder.name,
        model=model,
        scheme=scheme,
        status="gate_failed" if missed else "pushed" if place else "unchanged",
        repo_id=f"me/{folder.name}",
        folder=folder.name,
        size_bytes=size,
        bits_per_weight=bits[place],
        quantized_fraction=0.973,
        worst_sqnr_db=errors[place],
        metrics={"transformer": {"psnr_mean": errors[place] - 4, "output_sqnr_db": errors[place] - 9}},
        metrics_data="d",
        gates=gates,
        needs=NEEDS,
        manifest_sha256=file_sha256(folder / "aoconvert.json"),
        **where,
    )


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """Two models in four schemes: one misses a gate, one failed."""
    models = [Model(source=f"THUDM/{name}") for name in ("CogVideoX-5b", "CogVideoX-2b")]
    found = ReleaseFile(name="CogVideoX", models=models, variants=[Variant(scheme=name) for name in SCHEMES])
    root = tmp_path / "out"
    variants = [variant(model.title, place, root) for model in models for place in range(4)]
    failure = Failure(
        type="HubError",
        message="the Hub failed (503)",
        hint="run the same command again",
        exit_code=5,
        problems=("me/CogVideoX-2b-mixed-6bit: the Hub failed (503)",),
    )
    variants[7] = variants[7].model_copy(update={"status": "failed", "error": failure, "url": None, "commit": None})
    records = tuple(ModelRecord(name=model.title, source=model.source, revision="8d6e" * 10) for model in models)
    record = Record(name="CogVideoX", models=records, ok=False, variants=tuple(variants))
    options = ReleaseOptions(owner="me", output_root=Path("out"), token="hf_secret", fail_fast=True)
    return Page(Path("releases/my cog.toml"), found, options, record, root)


class Reader(HTMLParser):
    """What a page shows, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data")
        found = [(tag, name, value or "") for name, value in attrs if name in names or "url(" in (value or "")]
        self.addresses += found

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.shown += f"{data} "


def test_it_needs_nothing_else(page: Page) -> None:
    text = page.render()
    read = Reader(text)
    for tag, name, value in read.addresses:
        links = ("https://huggingface.co/me/CogVideoX-", "#CogVideoX-")
        assert value.startswith(links if (tag, name) == ("a", "href") else "data:image/png;base64,"), (tag, name, value)
    assert [value for tag, _, value in read.addresses if tag == "img"] == [
        f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"
    ] * 2
    assert {"script", "link", "iframe"}.isdisjoint(read.tags) and "@import" not in text and "url(" not in text
    assert read.tags.count("svg") == 2 and "hf_secret" not in text
    shown = " ".join(read.shown.split())
    assert "3 published, 2 published before, 2 gate missed, 1 failed" in shown
    assert "min-sqnr-db: 18.4, required: ≥ 20" in shown and "the Hub failed (503)" in shown
    assert "What to do: run the same command again" in shown
    assert "aoconvert release 'releases/my cog.toml' --owner me --output-root out --fail-fast" in shown
    assert "torchao ≥ 0.15, diffusers ≥ 0.36, cuda only" in shown and "CogVideoX-5b-int8wo" in shown


def test_one_model_has_no_matrix_and_other_files_no_pictures(page: Page) -> None:
    model, variants = page.record.models[0], page.record.variants[:4]
    (page.root / "CogVideoX-5b-int8wo" / "aoconvert.json").write_text("other files")
    record = page.record.model_copy(update={"models": (model,), "variants": variants})
    found = page.found.model_copy(update={"models": page.found.models[:1]})
    read = Reader(replace(page, record=record, found=found).render())
    assert "Models and schemes" not in read.shown and "img" not in read.tags


def test_nothing_in_a_record_breaks_out(page: Page) -> None:
    bad = "</style></title></svg><script>alert(1)</script><img src=http://evil.example/x>\"'{{ 7*7 }}"
    clean = sorted(Reader(page.render()).tags)
    first = page.record.variants[0]
    problem = Failure(type=bad, message=bad, hint=bad, exit_code=1, problems=(bad,))
    hostile = first.model_copy(
        update={
            "scheme": bad,
            "repo_id": bad,
            "url": f"javascript:{bad}",
            "commit": bad,
            "error": problem,
            "status": "failed",
            "needs": VariantNeeds(loads_with={bad: bad, "torchao": bad}, devices=(bad,), min_capability=bad),
            "gates": (GateResult(name=bad, limit=1, value=0, passed=False),),
        }
    )
    model = page.record.models[0].model_copy(update={"source": bad, "revision": bad})
    changes = {"name": bad, "variants": (hostile, *page.record.variants[1:]), "models": (model, page.record.models[1])}
    text = replace(page, record=page.record.model_copy(update=changes)).render()
    read = Reader(text)
    assert {"script"}.isdisjoint(read.tags) and read.tags.count("img") == clean.count("img")
    assert set(read.tags) == set(clean)
    assert not [value for *_, value in read.addresses if "evil" in value or "javascript" in value]
    assert "{{ 7*7 }}" in read.shown


def test_a_browser_shows_it(page: Page, tmp_path: Path) -> None:
    browser = find_browser(tmp_path)
    page.write()
    place = page.root / "release.html"
    dom, complaints = browser.read(place)
    assert complaints == []
    shown = " ".join(Reader(dom).shown.split())
    assert "gate missed" in shown and "CogVideoX-2b-mixed-6bit" in shown and "Size and error" in shown
    pictures = []
    for dark in (False, True):
        browser.show(place, tmp_path / "shot.png", 400, dark=dark)
        with Image.open(io.BytesIO((tmp_path / "shot.png").read_bytes())) as shot:
            assert len(shot.convert("RGB").getcolors(1 << 20) or []) > 50
            pictures.append(shot.convert("RGB").getpixel((1, 1)))
    assert pictures == [(255, 255, 255), (13, 17, 23)]
