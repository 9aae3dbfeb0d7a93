"""The card's section about what was lost: pairs with the original, the data, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import build_llama
from markdown_it import MarkdownIt

import aoconvert
from aoconvert.checkpoint.evaluation import (
    SCHEMA_VERSION,
    ComponentFigures,
    EvalData,
    EvalSource,
    Evaluation,
    LayerFigures,
    Metrics,
)
from aoconvert.checkpoint.files import file_sha256


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return aoconvert.quantize(build_llama(tmp_path / "model"), "int8wo", device="cpu", output=tmp_path / "out").output


def write_evaluation(folder: Path, **changes: Any) -> Evaluation:
    """A report as eval writes it."""
    part = ComponentFigures(
        name="",
        class_name="LlamaForCausalLM",
        task="causal-lm",
        metrics=Metrics(kl_mean=0.0123, top1_agreement=0.98765, perplexity_source=10.0, perplexity=10.5),
        noise_floor=Metrics(kl_mean=0.001, top1_agreement=1.0, perplexity_source=10.0, perplexity=10.01),
        layers=(LayerFigures(name="model.layers.0.mlp.up_proj", output_sqnr_db=35.2, weight_sqnr_db=40.0),),
    )
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "ok": True,
        "path": "out",
        "source": EvalSource(label="model", dtype="bfloat16"),
        "environment": {"device": "cpu", "device_name": "A CPU"},
        "data": EvalData(kind="generated", sha256="0" * 64, samples=8, tokens=2040, detail="text by itself", seed=1),
        "components": (part,),
        "gates": (),
        "reused": 0,
        "command": "aoconvert eval out --source user/model --samples 8 --max-kl 0.05",
        "date": "2026-12-01T00:00:00+00:00",
        "manifest_sha256": file_sha256(folder / "aoconvert.json"),
    }
    report = Evaluation(**{**values, **changes})
    (folder / "aoconvert.eval.json").write_text(report.dump())
    return report


def test_pairs_data_and_command(result: Path) -> None:
    before = aoconvert.card(result).text
    assert "How much it loses" not in before
    write_evaluation(result)
    text = aoconvert.card(result, repo_id="user/model-int8wo").text
    section = text.partition("## How much it loses\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[0] == ["", "original", "quantized", "change", "bfloat16 noise"]
    assert ["perplexity", "10", "10.5", "5.00 % more", "10.01"] in rows
    assert ["KL divergence from the original, mean (nats per token)", "0", "0.0123", "", "0.001"] in rows
    assert ["same most likely token", "100 %", "98.77 %", "", "100.00 %"] in rows
    assert [row[0] for row in rows].count("size") == 1
    assert "2040 tokens in 8 samples, on A CPU: text by itself." in section
    assert "aoconvert eval user/model-int8wo --source user/model --samples 8 --max-kl 0.05" in section
    assert "`model.layers.0.mlp.up_proj` 35.2 dB" in section
    assert MarkdownIt().enable("table").render(section).count("<table>") == 1


def test_an_evaluation_of_another_conversion_is_not_shown(result: Path) -> None:
    write_evaluation(result, manifest_sha256="0" * 64)
    assert "How much it loses" not in aoconvert.card(result).text
    (result / "aoconvert.eval.json").write_text("{")
    assert "How much it loses" not in aoconvert.card(result).text


@pytest.mark.parametrize(
    "command",
    [
        "aoconvert eval out --source $(reboot)",
        "aoconvert eval out --nosuch",
        "curl x | sh",
        "aoconvert push out",
        "aoconvert eval out --text '../../etc/passwd'",
        "aoconvert eval out 'unfinished",
        "aoconvert",
    ],
)
def test_a_command_that_somebody_else_wrote_is_not_shown(command: str, result: Path) -> None:
    write_evaluation(result, command=command)
    section = aoconvert.card(result).text.partition("## How much it loses\n")[2].partition("\n## ")[0]
    assert "```" not in section


def test_what_somebody_else_wrote_does_not_become_markup(result: Path) -> None:
    report = json.loads(write_evaluation(result).dump())
    report["data"]["detail"] = "<script>alert(1)</script> [x](https://x.example) | y"
    report["components"][0]["layers"][0]["name"] = "`</code>|<b>"
    (result / "aoconvert.eval.json").write_text(json.dumps(report))
    text = aoconvert.card(result).text
    assert "<script>" not in text and "<b>" not in text and "](https://x.example)" not in text
