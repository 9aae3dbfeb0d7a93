from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.shared import build_once

import aoconvert

Converted = Callable[[str], Path]

CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}assistant :"


def words_tokenizer(**options: Any) -> Any:
    """A real tokenizer of a few words, as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = "<pad> </s> <unk> why is the sky blue ? . : user assistant a cat sits on lying couch sofa"
    words = re.split(" ", vocabulary)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)


README = """\
---
license: other
license_name: tiny-terms
license_link: https://example.com/terms
language: [en, 'no']
pipeline_tag: text-generation
library_name: transformers
tags: [conversational, safetensors, 8-bit, gptq, 'base_model:a/b', 'license:mit', 'arxiv:2403.04692',
  int8wo, conversational]
---
# A tiny Llama
"""


def build_chat(folder: Path) -> None:
    """A Llama with a tokenizer, a chat template and a card."""
    import torch
    from helpers import tiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.llama(folder, tied=False)
    tokenizer = words_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README)


def build_t5(folder: Path) -> None:
    from helpers import tiny

    tiny.t5(folder)
    words_tokenizer(model_max_length=16).save_pretrained(folder)


# family → builder of the checkpoints that only the tests of cards need
OWN = {"llama-chat": build_chat, "t5-tokenizer": build_t5}


@pytest.fixture(scope="session")
def converted(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Converted checkpoints by family, ``family:scheme`` or one of this folder's own. Read only."""

    def build(folder: Path) -> None:
        family, _, scheme = folder.name.partition(":")
        source = folder / "source" if family in OWN else checkpoints(family)
        if family in OWN:
            OWN[family](source)
        aoconvert.quantize(source, scheme or "int8wo", output=folder / "out", device="cpu", min_quantized=0)

    return lambda name: build_once(tmp_path_factory, f"card/{name}", build) / "out"


@pytest.fixture(scope="session")
def verified(converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A copy of a converted checkpoint, verified with its example."""

    def build(folder: Path) -> None:
        shutil.copytree(converted(folder.name), folder / "out")
        report = aoconvert.verify(folder / "out", example=True)
        assert report.ok, report.to_dict()

    return lambda name: build_once(tmp_path_factory, f"verified/{name}", build) / "out"


@pytest.fixture
def pipeline(converted: Converted, tmp_path: Path) -> Path:
    """A CogVideoX pipeline of one's own, to write to."""
    return Path(shutil.copytree(converted("cogvideox"), tmp_path / "out"))
