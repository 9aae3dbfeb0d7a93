"""The card's section about what was lost: pairs with the original, the data, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.checkpoints import build_llama
from helpers.evaluations import write_evaluation
from markdown_it import MarkdownIt

import aoconvert
from aoconvert.checkpoint.evaluation import ComponentFigures, EvalData, Metrics, SkippedFigure


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return aoconvert.quantize(build_llama(tmp_path / "model"), "int8wo", device="cpu", output=tmp_path / "out").output


def test_pairs_data_and_command(result: Path) -> None:
    before = aoconvert.card(result)
    assert "How much it loses" not in before.text and "diamond" not in before.text
    write_evaluation(result)
    card = aoconvert.card(result, repo_id="user/model-int8wo")
    text = card.text
    assert card.picture is not None and "1 of their outputs, 35.2 to 35.2 dB" in card.picture
    assert "not the model's output; the diamonds are the same of each layer's output." in text
    section = text.partition("## How much it loses\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[0] == ["", "original", "quantized", "change", "bfloat16 noise"]
    assert ["perplexity", "10", "10.5", "&#43;5.00&nbsp;%", "10.01"] in rows
    assert ["KL divergence from the original, mean (nats per token)", "0", "0.0123", "", "0.001"] in rows
    assert ["same most likely token", "100 %", "98.77 %", "", "100.00 %"] in rows
    assert [row[0] for row in rows].count("size") == 1
    assert "2040 tokens in 8 samples, on A CPU: text by itself." in section
    assert "aoconvert eval user/model-int8wo --source user/model --samples 8 --max-kl 0.05" in section
    assert "`model.layers.0.mlp.up_proj` 35.2 dB" in section
    assert MarkdownIt().enable("table").render(section).count("<table>") == 1


def test_a_pipeline_has_its_pictures_and_says_what_is_missing(result: Path) -> None:
    """What equals the original is shown so: a PSNR that is infinite is not left out of the card in silence."""
    part = ComponentFigures(
        name="transformer",
        class_name="FluxTransformer2DModel",
        task="denoiser",
        metrics=Metrics(output_sqnr_db=40.0, cosine_mean=0.9999, latents_relative_error=0.01, ssim_mean=1.0),
        noise_floor=Metrics(output_sqnr_db=50.0),
        skipped_figures=(
            SkippedFigure(name="psnr_mean", reason="infinite: all pictures are equal to the original's"),
            SkippedFigure(name="psnr_min", reason="infinite: all pictures are equal to the original's"),
        ),
    )
    data = EvalData(kind="prompts", sha256="0" * 64, samples=2, detail="2 prompts, seed 1, 4 steps, 64x64", seed=1)
    (result / "eval.png").write_bytes(b"")
    write_evaluation(result, components=(part,), data=data)
    section = aoconvert.card(result).text.partition("## How much it loses\n")[2].partition("\n## ")[0]
    assert "| relative error of the final latents | 0 | 0.01 |" in section
    assert "4 steps, 64x64; PSNR of the pictures: infinite: all pictures are equal to the original's" in section
    assert "2 samples, on A CPU" in section
    assert "](eval.png)" in section


def test_an_evaluation_of_another_conversion_is_not_shown(result: Path) -> None:
    picture = aoconvert.card(result).picture
    write_evaluation(result, manifest_sha256="0" * 64)
    assert "How much it loses" not in aoconvert.card(result).text
    assert aoconvert.card(result).picture == picture
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
