"""A pipeline that is opened together with another one: the card says which, as diffusers reads it."""

from __future__ import annotations

from pathlib import Path

from helpers import own_parts
from huggingface_hub import ModelCard

import aoconvert
from aoconvert.cards import CardOptions, render, write


def test_the_prior_stays_connected(tmp_path: Path) -> None:
    own_parts.build("kandinsky", tmp_path / "source")
    text = "---\nprior:\n- kandinsky-community/kandinsky-2-1-prior\n- not a repo!\nlicense: mit\n---\n# Kandinsky\n"
    (tmp_path / "source/README.md").write_text(text)
    aoconvert.quantize(tmp_path / "source", "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    write(tmp_path / "out", render(tmp_path / "out", CardOptions()))
    assert ModelCard.load(tmp_path / "out/README.md").data.prior == ["kandinsky-community/kandinsky-2-1-prior"]
