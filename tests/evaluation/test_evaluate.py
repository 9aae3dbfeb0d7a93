"""Evaluations from the checkpoint to the report, against plain computations with the library's own models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checkpoints import build_llama
from helpers.documents import check_document
from helpers.evaluating import Line, asked, build_model, word_tokenizer

import aoconvert
from aoconvert.checkpoint.evaluation import Evaluation, read_evaluation

__all__ = ["asked"]

_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4}


def mixtral(folder: Path) -> Path:
    config = transformers.MixtralConfig(**_TEXT, **_HEADS, num_key_value_heads=2, num_local_experts=4)
    return build_model(transformers.MixtralForCausalLM(config), folder)


def t5(folder: Path) -> Path:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0
    )
    return build_model(transformers.T5ForConditionalGeneration(config), folder)


def bert(folder: Path) -> Path:
    return build_model(transformers.BertModel(transformers.BertConfig(**_TEXT, **_HEADS)), folder, torch.float32)


def classifier(folder: Path) -> Path:
    config = transformers.BertConfig(**_TEXT, **_HEADS, num_labels=3)
    return build_model(transformers.BertForSequenceClassification(config), folder)


def quantized(source: Path, scheme: str = "int8wo", **options: Any) -> Path:
    output = source.with_name(f"{source.name}-{scheme}")
    return aoconvert.quantize(source, scheme, device="cpu", output=output, min_quantized=0.0, **options).output


def outputs(folder: Path, cls: Any, inputs: list[dict[str, Any]], dtype: torch.dtype | None = None) -> list[Any]:
    model = cls.from_pretrained(folder, **({"dtype": dtype} if dtype is not None else {})).eval()
    with torch.no_grad():
        return [model(**given) for given in inputs]


def kept(cache: Path) -> list[dict[str, Any]]:
    """What both models were given, as it was kept."""
    [file] = (cache / "eval").glob("*/data.pt")
    found: list[dict[str, Any]] = torch.load(file, weights_only=True)
    return found


@pytest.mark.parametrize(
    ("build", "cls", "task"),
    [
        (build_llama, transformers.LlamaForCausalLM, "causal-lm"),
        pytest.param(t5, transformers.T5ForConditionalGeneration, "seq2seq", marks=pytest.mark.exhaustive),
        pytest.param(mixtral, transformers.MixtralForCausalLM, "causal-lm", marks=pytest.mark.exhaustive),
    ],
)
def test_language_models(build: Any, cls: Any, task: str, asked: list[Line], tmp_path: Path) -> None:
    """The figures are those of a plain computation in memory."""
    source = build(tmp_path / "model")
    result = quantized(source)
    report = aoconvert.evaluate(result, source=str(source), samples=2, tokens=16)
    inputs = kept(tmp_path / "cache")
    name = "decoder_input_ids" if task == "seq2seq" else "input_ids"
    before, after = outputs(source, cls, inputs, torch.bfloat16), outputs(result, cls, inputs)
    p, q = (torch.cat([item.logits[0, :-1] for item in found]).double().log_softmax(-1) for found in (before, after))
    targets = torch.cat([given[name][0, 1:] for given in inputs])
    kl = (p.exp() * (p - q)).sum(-1)
    [part] = report.components
    assert part.task == task
    assert part.metrics.kl_mean == pytest.approx(float(kl.mean()), rel=1e-6)
    assert part.metrics.kl_max == pytest.approx(float(kl.max()), rel=1e-6)
    assert part.metrics.kl_mean > 0
    assert part.metrics.perplexity == pytest.approx(math.exp(float(-q.gather(1, targets[:, None]).mean())), rel=1e-6)
    assert report.data.tokens == len(targets) == 30
    assert report.data.kind == "generated"
    assert part.noise_floor.kl_mean is not None and part.noise_floor.kl_mean > 0
    assert read_evaluation(result / "aoconvert.eval.json") == report
    check_document("eval", report.to_dict())


@pytest.mark.parametrize(
    ("build", "cls", "task"),
    [
        (bert, transformers.BertModel, "encoder"),
        pytest.param(
            classifier, transformers.BertForSequenceClassification, "classifier", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_encoders_and_classifiers(build: Any, cls: Any, task: str, asked: list[Line], tmp_path: Path) -> None:
    source = build(tmp_path / "model")
    result = quantized(source)
    report = aoconvert.evaluate(result, source=str(source), samples=2, tokens=16)
    [part] = report.components
    assert (part.task, report.data.kind) == (task, "random-tokens")
    inputs = kept(tmp_path / "cache")
    before, after = outputs(source, cls, inputs), outputs(result, cls, inputs)
    if task == "classifier":
        p, q = (torch.cat([item.logits for item in found]).double().log_softmax(-1) for found in (before, after))
        assert part.metrics.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
        return
    a, b = (torch.cat([item.last_hidden_state for item in found]).double() for found in (before, after))
    error = float((a - b).norm() / a.norm())
    assert part.metrics.output_relative_error == pytest.approx(error, rel=1e-6)
    pooled = torch.nn.functional.cosine_similarity(a.mean(1), b.mean(1))
    assert part.metrics.cosine_min == pytest.approx(float(pooled.min()), abs=1e-12)
    # a float32 original: the floor is rounding it to bfloat16 really
    assert part.noise_floor.output_relative_error is not None
    assert 0 < part.noise_floor.output_relative_error < error
    assert {layer.name for layer in part.layers} >= {"encoder.layer.0.attention.self.query", "pooler.dense"}


def test_the_original_runs_once_for_many_schemes(
    asked: list[Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_llama(tmp_path / "model")
    reports = [
        aoconvert.evaluate(quantized(source, scheme), source=str(source), samples=2, tokens=16)
        for scheme in ("int8wo", "float8wo", "float8wo_e5m2")
    ]
    assert [request["role"] for request in asked] == ["original", "quantized", "quantized", "quantized"]
    assert [report.reused for report in reports] == [0, 2, 2]
    assert len({report.data.sha256 for report in reports}) == 1
    aoconvert.evaluate(tmp_path / "model-int8wo", source=str(source), samples=2, tokens=16, seed=2)
    assert [request["role"] for request in asked][4:] == ["original", "quantized"]
    places = {Path(request["folder"]) for request in asked}
    assert len(places) == 2 and all(place.is_dir() for place in places)
    monkeypatch.setenv("AOCONVERT_CACHE_LIMIT", "1")
    aoconvert.evaluate(tmp_path / "model-int8wo", source=str(source), samples=2, tokens=16, seed=2)
    assert [place for place in places if place.is_dir()] == [Path(asked[-1]["folder"])]  # what was used last


def test_a_run_that_was_killed_goes_on_with_the_next_sample(
    asked: list[Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aoconvert.evaluation.children import eval_child

    class Killed(BaseException):
        pass

    source = build_llama(tmp_path / "model")
    result = quantized(source)
    ran: list[str] = []
    run_sample = eval_child.run_sample

    def interrupted(model: Any, task: str, sample: Any) -> Any:
        ran.append(task)
        if len(ran) == 3:  # a pass and one with noise for each sample
            raise Killed
        return run_sample(model, task, sample)

    monkeypatch.setattr(eval_child, "run_sample", interrupted)
    wishes: dict[str, Any] = {"source": str(source), "samples": 3, "tokens": 16}
    with pytest.raises(Killed):
        aoconvert.evaluate(result, **wishes)
    assert not (result / "aoconvert.eval.json").exists()
    ran.extend(["", ""])
    before = len(ran)
    report = aoconvert.evaluate(result, **wishes)
    assert report.reused == 1
    assert len(ran) - before == 2 * 2 + 3
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", "")
    whole = aoconvert.evaluate(result, **wishes)
    assert whole.components == report.components


def test_an_unquantized_copy_loses_nothing(asked: list[Line], tmp_path: Path) -> None:
    """All is carried over but one layer, whose weights int8 holds exactly."""
    source = build_llama(tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.copy_(torch.ones(64, 64))
    model.save_pretrained(source)
    result = quantized(source, skip=["re:.*(?<!layers.0.self_attn.q_proj).weight"])
    report = aoconvert.evaluate(result, source=str(source), samples=2, tokens=16)
    [part] = report.components
    assert (part.metrics.top1_agreement, [layer.name for layer in part.layers]) == (
        1.0,
        ["model.layers.0.self_attn.q_proj"],
    )
    assert part.metrics.kl_max is not None and part.metrics.kl_max < 1e-4


WORDS = "the quick brown fox jumps over a lazy dog and runs away from here"


def test_text_is_cut_in_windows(asked: list[Line], tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    word_tokenizer(source, WORDS, bos=True)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text(f"{WORDS} {WORDS}")  # 28 words
    texts[1].write_text(WORDS)
    report = aoconvert.evaluate(quantized(source), source=str(source), samples=9, tokens=11, text=texts)
    assert (report.data.kind, [file.name for file in report.data.files]) == ("text", ["a.txt", "b.txt"])
    rows = [given["input_ids"][0].tolist() for given in kept(tmp_path / "cache")]
    assert [len(row) for row in rows] == [11, 11, 9, 11, 5]  # each begins with the first token of a text
    assert all(row[0] == 1 for row in rows)
    assert rows[0][1:4] == [3, 4, 5]
    assert report.command.endswith("--text a.txt --text b.txt --samples 9 --tokens 11")


@pytest.mark.parametrize(
    ("text", "tokenizer", "said"),
    [
        ("", True, "is empty"),
        ("fox", True, "fewer than 2 tokens"),
        (WORDS, False, "--text needs a tokenizer"),
        (None, True, "No such file"),
        (b"\xff\xfe", True, "is not UTF-8 text"),
    ],
)
def test_a_text_that_nothing_can_be_done_with(
    text: str | bytes | None, tokenizer: bool, said: str, asked: list[Line], tmp_path: Path
) -> None:
    source = build_llama(tmp_path / "model")
    if tokenizer:
        word_tokenizer(source, WORDS)
    result, file = quantized(source), tmp_path / "text.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(aoconvert.UsageError, match=said):
        aoconvert.evaluate(result, source=str(source), text=[file])
    assert not (result / "aoconvert.eval.json").exists()


def test_a_source_that_is_another_model_is_refused(asked: list[Line], tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    word_tokenizer(source, WORDS)
    result = quantized(source)
    larger = build_llama(tmp_path / "larger", vocab_size=160)
    with pytest.raises(aoconvert.SourceError, match="its vocab_size is 160, the result's is 128"):
        aoconvert.evaluate(result, source=str(larger))
    with pytest.raises(aoconvert.SourceError, match="is another model: BertModel, not LlamaForCausalLM"):
        aoconvert.evaluate(result, source=str(bert(tmp_path / "bert")))
    other = build_llama(tmp_path / "other")
    word_tokenizer(other, WORDS[::-1])
    with pytest.raises(aoconvert.SourceError, match=r"tokenizer\.json has a different SHA-256"):
        aoconvert.evaluate(result, source=str(other))
    assert asked == []


def test_a_damaged_or_unfinished_checkpoint_is_refused(asked: list[Line], tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    result = quantized(source)
    (result / "config.json").write_text("{}")
    with pytest.raises(aoconvert.AoconvertError, match="config"):
        aoconvert.evaluate(result, source=str(source))
    (result / "aoconvert.json").unlink()
    with pytest.raises(aoconvert.SourceError, match=r"aoconvert\.json"):
        aoconvert.evaluate(result, source=str(source))
    assert asked == []


@pytest.mark.parametrize(
    ("option", "value", "missed"),
    [
        pytest.param("max_kl", 10.0, False, marks=pytest.mark.exhaustive),
        ("max_kl", 1e-12, True),
        pytest.param("min_agreement", 0.0, False, marks=pytest.mark.exhaustive),
        pytest.param("max_perplexity_ratio", 0.5, True, marks=pytest.mark.exhaustive),
    ],
)
def test_gates(option: Any, value: float, missed: bool, asked: list[Line], tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    result = quantized(source)
    report = aoconvert.evaluate(result, source=str(source), samples=1, tokens=8, **{option: value})
    [gate] = report.gates
    assert (gate.name, gate.limit, gate.passed) == (option.replace("_", "-"), value, not missed)
    assert (report.ok, report.exit_code) == (not missed, 4 if missed else 0)
    assert Evaluation.model_validate(json.loads((result / "aoconvert.eval.json").read_text())).ok is not missed


def test_a_gate_that_does_not_apply_is_refused_before_any_work(asked: list[Line], tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    result = quantized(source)
    with pytest.raises(aoconvert.UsageError, match=r"--min-psnr does not apply to this model \(causal-lm\)"):
        aoconvert.evaluate(result, source=str(source), min_psnr=30.0)
    with pytest.raises(aoconvert.UsageError, match="--max-kl must be a finite number"):
        aoconvert.evaluate(result, source=str(source), max_kl=math.nan)
    assert asked == []


def test_an_original_that_gives_nan_is_named(asked: list[Line], tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(source)
    result = quantized(source)
    with pytest.raises(aoconvert.SourceError, match="original model is not finite"):
        aoconvert.evaluate(result, source=str(source), samples=1, tokens=8)
    assert not (result / "aoconvert.eval.json").exists()


def test_the_report_of_a_repo_is_not_put_into_the_cache(asked: list[Line], tmp_path: Path) -> None:
    """A repo in the Hub's cache, as the Hub client lays it out."""
    source = build_llama(tmp_path / "model")
    repo, commit = tmp_path / "hub" / "models--user--tiny", "1" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = Path(shutil.copytree(quantized(source), repo / "snapshots" / commit))
    before = sorted(snapshot.rglob("*"))
    report = aoconvert.evaluate(
        "user/tiny", source=str(source), cache_dir=tmp_path / "hub", local_files_only=True, samples=1, tokens=4
    )
    assert report.ok and report.unwritten is None and report.path == "user/tiny"
    assert sorted(snapshot.rglob("*")) == before


@pytest.mark.exhaustive
def test_the_programs_of_eval_can_be_forked(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    report = aoconvert.evaluate(quantized(source), source=str(source), samples=1, tokens=4)
    assert report.ok and report.data.tokens == 3
