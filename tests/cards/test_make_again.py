"""The command under "To make it again", run as it is printed, makes the same files."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from reading import read

from aoconvert.cards import CardOptions, render
from aoconvert.checkpoint import manifest as manifests
from aoconvert.cli.main import cli

LAYERS = """
default = "int8wo"
rule = [
  { match = 're:.*\\.(q_proj|to_q)', scheme = "float8wo" },
  { match = 're:.*\\.(o_proj|to_out\\.0)', scheme = "skip" },
]
"""
PARTS = """
[component.transformer]
default = "int8wo"
rule = [{ match = 're:.*\\.to_q', scheme = "intx4wo", group_size = 32 }]
[component.text_encoder_2]
default = "float8wo"
"""
# family, recipe, options; the first has all that can go wrong at little cost
CASES = {
    "llama": ("llama-tied", LAYERS, ["--include-embeddings", "--no-default-skips"]),
    "scheme beside it": ("llama-tied", LAYERS.replace('default = "int8wo"', ""), ["--scheme", "int8dq"]),
    "components": ("flux", PARTS, ["--component", "transformer", "--component", "text_encoder_2"]),
    "int4 for a GPU": (
        "bert",
        'default = { scheme = "int4wo", group_size = 32, layout_device = "cuda" }\n'
        'rule = [{ match = "re:.*query", scheme = "int8wo" }]',
        [],
    ),
    "skipped": ("bert", 'default = "int8wo"', ["--skip", "re:.*\\.0\\..*"]),
    "no recipe": ("llama-tied", "", ["--scheme", "int8wo", "--skip", "re:.*(q|k)_proj", "--untie"]),
}
USUAL = {"llama", "components"}


def quantize(arguments: list[str], output: Path) -> manifests.Manifest:
    done = CliRunner().invoke(cli, ["quantize", *arguments, "-o", str(output), "-q"], standalone_mode=False)
    assert done.return_value == 0, (arguments, done.output, done.exception)
    return manifests.load(output)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in USUAL else pytest.mark.exhaustive) for case in CASES]
)
def test_the_same_bytes(
    case: str, checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, recipe, options = CASES[case]
    (tmp_path / "mine.toml").write_text(recipe)
    given = ["--recipe", str(tmp_path / "mine.toml")] if recipe else []
    first = quantize([str(checkpoints(family)), *given, *options, "--device", "cpu"], tmp_path / "out")
    card = read(render(tmp_path / "out", CardOptions(), repo_id="a/b").text)
    assert "mine" not in card.shown.split()  # a file that no reader of the card has
    assert not any("mine" in (tensor.reason or "") for part in first.components for tensor in part.tensors)
    words = shlex.split(card.fences("bash")[-1])
    assert words[:2] == ["aoconvert", "quantize"] and "mine.toml" not in words
    assert ("--recipe" in words) == bool(recipe) == ("beside aoconvert.json, which contains the recipe" in card.shown)
    # where the card's reader is: the source, and what is published
    reader = tmp_path / "reader"
    reader.mkdir()
    (reader / Path(words[2]).name).symlink_to(checkpoints(family))
    shutil.copy(tmp_path / "out" / "aoconvert.json", reader)
    monkeypatch.chdir(reader)
    again = quantize(words[2:], tmp_path / "again")
    assert [part.files for part in again.components] == [part.files for part in first.components]
    assert again.copied == first.copied
