"""Every class of the libraries that can be built tiny: a few by default, all on demand; ``run.py`` makes the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from classes import run
from classes.rows import make_row

import aoconvert

CONFIGS, STORED = run.configs(), run.stored()

# one of each kind: of text, image, video, sound and both; decoders beside encoders; experts; layers that cannot stay;
# a class that cannot run in bfloat16; denoisers of images and videos, as images and as patches; an autoencoder
USUAL = {
    *("transformers:CLIPModel", "transformers:T5ForConditionalGeneration", "transformers:MixtralForCausalLM"),
    *("transformers:MambaForCausalLM", "transformers:FNetForMaskedLM", "transformers:VivitForVideoClassification"),
    *("transformers:WhisperForConditionalGeneration", "transformers:LlavaForConditionalGeneration"),
    *("diffusers:FluxTransformer2DModel", "diffusers:WanTransformer3DModel", "diffusers:DiTTransformer2DModel"),
    "diffusers:AutoencoderKL",
}
_COMPARED = ("quantized", "tensors", "forward", "verify")


@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=[] if t in USUAL else [pytest.mark.exhaustive]) for t in CONFIGS]
)
def test_class(title: str, tmp_path: Path) -> None:
    row = make_row(title, CONFIGS[title], tmp_path).to_dict()
    assert {key: row[key] for key in _COMPARED} == {key: STORED[title][key] for key in _COMPARED}, row["note"]


def test_no_result_is_wrong() -> None:
    """What the table says of every class that was converted."""
    assert set(STORED) == set(CONFIGS)
    assert set(CONFIGS) >= USUAL
    for title, row in STORED.items():
        if row["quantized"] is not None:
            assert row["tensors"] in ("equal", "equal*"), title
            assert row["forward"] in ("equal", "runs", "-"), title
            assert row["verify"] in ("ok", "skipped"), title


def test_nearly_every_class_gets_a_forward_pass() -> None:
    made = [row for row in STORED.values() if row["quantized"] is not None]
    assert sum(row["forward"] != "-" for row in made) >= 0.95 * len(made)


def test_the_page_is_of_these_rows() -> None:
    versions = run.README.read_text(encoding="utf-8").partition(" --write` with ")[2].partition(".\n")[0]
    assert run.README.read_text(encoding="utf-8") == run.page(list(STORED.values()), versions)


@pytest.mark.exhaustive  # a verification takes seconds of imports; the others run its check of the forward pass
@pytest.mark.parametrize("title", sorted(USUAL))
def test_the_whole_verification(title: str, tmp_path: Path) -> None:
    make_row(title, CONFIGS[title], tmp_path)
    report = aoconvert.verify(tmp_path / "out", source=str(tmp_path / "source"))
    assert report.ok, report.to_dict()
    assert [one.status for one in report.forward] == ["passed"]
