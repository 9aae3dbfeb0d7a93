"""Whose licence a card names: the source's, in its own words, and no other in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from editing import edit
from reading import read

from aoconvert.cards import CardOptions, render
from aoconvert.engine.source_card import read_card
from aoconvert.errors import PlanError
from aoconvert.sources.folder import FolderSource


def say(folder: Path, **values: Any) -> None:
    """What the source's card says."""
    edit(folder, lambda manifest: manifest["source"].update(license=values.get("license"), card=values))


@pytest.mark.parametrize("asked", ["mit", "MIT", "other", "llama3"])
def test_a_licence_that_contradicts_the_source_is_refused(asked: str, pipeline: Path) -> None:
    say(pipeline, license="llama3.1")
    with pytest.raises(PlanError) as found:
        render(pipeline, CardOptions(license=asked))
    assert found.value.problems == (f"--license {asked} contradicts the source's card, which says llama3.1",)
    assert "--set-metadata license=" in (found.value.hint or "")


@pytest.mark.parametrize("said", ["llama3.1", "Llama3.1", "LLAMA3.1"])
def test_the_same_licence_is_no_contradiction(said: str, pipeline: Path) -> None:
    say(pipeline, license=said, license_link="https://example.com/l")
    for options in (CardOptions(), CardOptions(license="llama3.1"), CardOptions(license="Llama3.1")):
        card = render(pipeline, options)
        front = read(card.text).front
        assert (front["license"], front["license_link"]) == ("llama3.1", "https://example.com/l")
        assert card.warnings == ()


def test_another_licence_has_its_own_way_and_is_said(pipeline: Path) -> None:
    say(pipeline, license="llama3.1", license_link="https://example.com/l")
    card = render(pipeline, CardOptions(metadata={"license": "mit"}))
    front = read(card.text).front
    assert front["license"] == "mit" and "license_link" not in front
    assert "licence mit: the source's card says llama3.1" in card.warnings
    assert "Licence: mit" in read(card.text).shown
    gone = render(pipeline, CardOptions(metadata={"license": None}))
    assert "licence left out: the source's card says llama3.1" in gone.warnings


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Apple Sample Code License", "apple-sample-code-license"),
        ("custom", "custom"),
        ("https://example.com/terms?v=1", "https-example.com-terms-v-1"),
        ("mit, apache-2.0", "mit-apache-2.0"),
        ("[click](http://evil.example)", "click-http-evil.example"),
    ],
)
def test_a_licence_that_is_no_id_is_shown_as_it_stands(said: str, name: str, pipeline: Path) -> None:
    say(pipeline, license=said)
    card = render(pipeline, CardOptions())
    page = read(card.text)
    assert f"Licence: {said}" in page.shown
    assert (page.front["license"], page.front["license_name"]) == ("other", name)
    assert any(repr(said) in line and "not on the Hub's list" in line for line in card.warnings) == (said != name)
    assert not any("names none" in line for line in card.warnings)
    assert not any("evil" in link for link in page.links)


@pytest.mark.parametrize("said", ["自定义许可证", "!!!"])
def test_a_licence_that_makes_no_name(said: str, pipeline: Path) -> None:
    say(pipeline, license=said)
    page = read(render(pipeline, CardOptions()).text)
    assert page.front["license"] == "other" and "license_name" not in page.front
    assert f"Licence: {said}" in page.shown


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("mit", "mit"),
        ("[mit]", "mit"),
        ("[mit, apache-2.0]", "mit, apache-2.0"),
        ("\n- llama3.1\n- gemma", "llama3.1, gemma"),
        ("Apache-2.0", "Apache-2.0"),
        ("[]", None),
        ("1.0", None),
        ("{a: b}", None),
    ],
)
def test_what_is_read_of_the_source_s_card(written: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {written}\nlanguage: en\n---\n# x\n")
    card = read_card(FolderSource(tmp_path))
    assert card is not None
    assert card.license == found


def test_tags_of_other_licences_stay_behind(pipeline: Path) -> None:
    say(pipeline, license="llama3.1", tags=["mit", "Apache-2.0", "llama3.1", "license:mit", "video", "other"])
    front = read(render(pipeline, CardOptions()).text).front
    assert front["tags"][:3] == ["llama3.1", "video", "other"]
    assert not {"mit", "Apache-2.0", "license:mit"} & set(front["tags"])


def test_other_with_its_name_and_link(pipeline: Path) -> None:
    say(pipeline, license="other", license_name="My Terms", license_link="https://example.com/terms")
    page = read(render(pipeline, CardOptions()).text)
    assert (page.front["license"], page.front["license_name"]) == ("other", "my-terms")
    assert "Licence: My Terms" in page.shown and "https://example.com/terms" in page.links


def test_a_base_model_that_is_not_the_source_is_said(pipeline: Path) -> None:
    edit(pipeline, lambda values: values["source"].update(kind="hub", repo_id="a/b", revision="0" * 40))
    lines = {
        "c/d": "base_model c/d: the weights are those of a/b",
        None: "base_model left out: the weights are those of a/b",
    }
    for given, line in lines.items():
        assert line in render(pipeline, CardOptions(metadata={"base_model": given})).warnings
    both = render(pipeline, CardOptions(metadata={"base_model": ["a/b", "c/d"]})).warnings
    assert not any(line.startswith("base_model") for line in both)
    tuned = render(pipeline, CardOptions(metadata={"base_model_relation": "finetune"})).warnings
    assert any(line.startswith("base_model_relation finetune") for line in tuned)
