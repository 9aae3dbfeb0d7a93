"""--set-metadata, --license, --card-template, and the command itself."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reading import read

from aoconvert.cards import CardOptions, render
from aoconvert.cards.metadata import parse_metadata
from aoconvert.errors import UsageError

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    from aoconvert.cli.main import main

    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["card", *map(str, arguments)])
        written = capfd.readouterr()
        return int(str(ended.value.code)), written.out, written.err

    yield run
    signal.signal(signal.SIGTERM, before)


# --- metadata


@pytest.mark.parametrize(
    ("item", "key", "value"),
    [
        ("language=no", "language", "no"),
        ("language=[en, no]", "language", ["en", "no"]),
        ("license=mit", "license", "mit"),
        ("license_name='1.0'", "license_name", "1.0"),
        ("inference=false", "inference", False),
        ("co2_eq_emissions=12.5", "co2_eq_emissions", 12.5),
        ("pipeline_tag=", "pipeline_tag", None),
        ("datasets=a/b", "datasets", "a/b"),
        ("thumbnail=https://x.example/a=b.png", "thumbnail", "https://x.example/a=b.png"),
    ],
)
def test_metadata_is_yaml(item: str, key: str, value: Any, pipeline: Path) -> None:
    found = parse_metadata([item])
    assert found == {key: value}
    front = read(render(pipeline, CardOptions(metadata=found)).text).front
    assert front.get(key) == value


@pytest.mark.parametrize(
    ("item", "message", "hint"),
    [
        ("license", "is not KEY=VALUE", None),
        ("=x", "is not KEY=VALUE", None),
        ("licence=mit", "no metadata key 'licence'", "did you mean license?"),
        ("pipeline-tag=x", "no metadata key", "did you mean pipeline_tag?"),
        ("quantized=yes", "no metadata key", "the keys are in https://"),
        ("tags=[a", "is not YAML", "quote the value"),
        ("license=[mit, gpl]", "takes a text, not", None),
        ("language={a: b}", "takes a text or a list of texts", None),
        ("inference=maybe", "takes true or false", None),
        ("co2_eq_emissions=true", "takes a number", None),
        ("widget=x", "is a nested value", None),
        ('license="a\\nb"', "contains unprintable characters", None),
        ("base_model_relation=copy", "is one of adapter, finetune", None),
    ],
)
def test_metadata_that_the_hub_does_not_know(item: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=r"\S") as caught:
        parse_metadata([item])
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_metadata_from_python_is_checked_too(pipeline: Path) -> None:
    with pytest.raises(UsageError, match="no metadata key"):
        render(pipeline, CardOptions(metadata={"licens": "mit"}))


def test_given_values_replace(converted: Any) -> None:
    folder = converted("llama-chat")
    given = {"license": "mit", "tags": ["mine"], "language": None}
    front = read(render(folder, CardOptions(metadata=given)).text).front
    assert front["tags"] == ["mine", "torchao", "int8wo", "aoconvert"]
    assert front["license"] == "mit"
    assert not {"license_name", "license_link", "language"} & set(front)  # they belonged to the source's licence
    front = read(render(folder, CardOptions(metadata={"base_model": "a/b"})).text).front
    assert (front["base_model"], front["base_model_relation"]) == ("a/b", "quantized")


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (CardOptions(license="apache2.0"), "did you mean apache-2.0?"),
        (CardOptions(license="other"), "needs a name and a link"),
        (
            CardOptions(license="other", metadata={"license_name": "My Terms", "license_link": "x"}),
            "does not accept the license_name",
        ),
        (CardOptions(license="mit", metadata={"pipeline_tag": "text-to-vidio"}), "did you mean text-to-video?"),
    ],
)
def test_what_the_hub_would_not_take_is_said(options: CardOptions, warning: str, pipeline: Path) -> None:
    assert any(warning in line for line in render(pipeline, options).warnings)


# --- templates


def test_a_template_of_ones_own(pipeline: Path, tmp_path: Path) -> None:
    template = tmp_path / "card.jinja"
    template.write_text(
        "# {{ title }} | {{ components[0].scheme | code }}\n\n{{ code.load | block('python') }}\n"
        "{% for c in components %}{{ c.bytes_out | size }} {{ c.quantized_fraction | percent }}{% endfor %}\n"
        "{{ '<b>' }} {{ 'x' | link('javascript:alert(1)') }} {{ 1.5 }} {{ 2 | plural('file') }}\n"
    )
    page = read(render(pipeline, CardOptions(template=template)).text)
    assert page.headings == ["h1 CogVideoXPipeline int8wo | `int8wo`"]
    assert "3.76 MB 99.1 %" in page.shown
    assert "<b> x 1.5 2 files" in page.shown and not page.links
    assert page.front["tags"][-1] == "aoconvert"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a\n{% if %}\n", 2, "Expected an expression"),
        ("a\n\n{{ nothing }}\n", 3, "'nothing' is undefined"),
        ("{{ components[0].nothing }}", 1, "has no attribute 'nothing'"),
        ("\n{{ ''.__class__ }}", 2, "unsafe"),
        ("{{ title.__init__.__globals__ }}", 1, "unsafe"),
        ("{{ 1 / 0 }}", 1, "division by zero"),
        ("{{ code | nofilter }}", 1, "No filter named 'nofilter'"),
        ("{% include '/etc/passwd' %}", 1, "no loader"),
        ("{{ components.append(1) }}", 1, "unsafe"),
    ],
)
def test_a_template_that_fails(text: str, line: int, what: str, pipeline: Path, tmp_path: Path) -> None:
    template = tmp_path / "card.jinja"
    template.write_text(text)
    with pytest.raises(UsageError, match=r"card\.jinja, line") as caught:
        render(pipeline, CardOptions(template=template))
    assert f"line {line}: " in caught.value.message
    assert what in caught.value.message


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_template_that_cannot_be_read(content: bytes | None, pipeline: Path, tmp_path: Path) -> None:
    template = tmp_path / "card.jinja"
    if content is not None:
        template.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        render(pipeline, CardOptions(template=template))


# --- the command


def test_it_prints_the_card(pipeline: Path, call: Call) -> None:
    code, out, err = call(pipeline, "--repo-id", "user/x")
    assert (code, err) == (0, "warning: the licence is unknown: the source's card names none; give it with --license\n")
    assert out == render(pipeline, CardOptions(), repo_id="user/x").text
    assert not (pipeline / "README.md").exists()


def test_it_writes_and_keeps_what_was_edited(pipeline: Path, call: Call) -> None:
    readme = pipeline / "README.md"
    code, out, err = call(pipeline, "--write", "--license", "mit")
    assert (code, out.split(), err) == (0, [str(pipeline / "sqnr.svg"), str(readme)], "")
    assert call(pipeline, "--write", "--license", "mit", "-q")[:2] == (0, f"{readme}\n")
    readme.write_text(readme.read_text() + "Mine.\n")
    code, out, err = call(pipeline, "--write")
    assert (code, out) == (3, "")
    assert "was edited by hand" in err and "--overwrite" in err
    assert readme.read_text().endswith("Mine.\n")
    assert call(pipeline, "--write", "--overwrite", "--license", "mit")[0] == 0
    assert "Mine." not in readme.read_text()


def test_json(pipeline: Path, call: Call) -> None:
    code, out, _ = call(pipeline, "--json", "--write", "--set-metadata", "license=mit")
    data = json.loads(out)
    assert code == 0
    assert data["path"] == str(pipeline) and data["warnings"] == []
    assert data["card"] == (pipeline / "README.md").read_text()
    assert data["picture"] == (pipeline / "sqnr.svg").read_text()
    assert data["written"] == [str(pipeline / "sqnr.svg"), str(pipeline / "README.md")]


def test_wrong_use(pipeline: Path, tmp_path: Path, call: Call) -> None:
    assert call(pipeline, "--overwrite")[0] == 2
    assert call(pipeline, "--set-metadata", "x")[0] == 2
    assert call(pipeline, "--repo-id", "a b")[0] == 2
    assert call(tmp_path / "nowhere")[0] == 3


def test_a_written_card_does_not_disturb_verify(pipeline: Path, call: Call) -> None:
    from aoconvert.checkpoint.files import check_files
    from aoconvert.checkpoint.manifest import load

    assert call(pipeline, "--write", "-q")[0] == 0
    assert check_files(pipeline, load(pipeline))[0] == []
