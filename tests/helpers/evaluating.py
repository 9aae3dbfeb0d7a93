"""Evaluations without fresh interpreters: the same program, called in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from aoconvert.evaluation import models, pipelines
from aoconvert.evaluation.children import eval_child
from aoconvert.verification.process import Children

Line = dict[str, Any]


class Here(Children):
    """Runs the program in this process. ``asked`` are the requests."""

    asked: list[Line]

    def ask(
        self,
        program: str,
        request: dict[str, Any],
        *,
        nbytes: int = 0,
        fetched: int = 0,
        environment: Mapping[str, str] | None = None,
        notice: Callable[[Line], None] | None = None,
    ) -> list[Line]:
        type(self).asked.append(request)
        lines: list[Line] = []

        def say(line: Line) -> None:
            lines.append(line)
            if notice is not None:
                notice(line)

        if program == "pipeline_child":
            from aoconvert.evaluation.children import pipeline_child

            eval_child.answer(request, say, pipeline_child.RUNS)
        else:
            eval_child.answer(request, say)
        return lines


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Line]]:
    """Have evaluations run in this process, with a cache of their own; gives the requests."""
    Here.asked = []
    for module in (models, pipelines):
        monkeypatch.setattr(module, "Children", Here)
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(tmp_path / "cache"))
    yield Here.asked


def build_model(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model with random weights as transformers saves it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def word_tokenizer(folder: Path, words: str, *, bos: bool = False) -> None:
    """A tokenizer of whole words, with or without a token at the begin of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: at for at, word in enumerate(words.split(), 3)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
