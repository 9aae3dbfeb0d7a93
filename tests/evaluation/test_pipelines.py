"""Evaluations of whole pipelines, beside what the library's own pipelines give in this process."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers.documents import check_document
from helpers.evaluating import Line, asked
from PIL import Image
from safetensors.torch import load_file

import aoconvert
from aoconvert.checkpoint.evaluation import read_evaluation

__all__ = ["asked"]

Checkpoints = Callable[[str], Path]


def quantized(source: Path, output: Path, scheme: str = "int8wo", **options: Any) -> Path:
    return aoconvert.quantize(source, scheme, device="cpu", output=output, min_quantized=0.0, **options).output


def prompts(folder: Path, text: str = "a panda\n") -> Path:
    path = folder / "prompts.txt"
    path.write_text(text)
    return path


def call(folder: Path, **arguments: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    return pipe("a panda", generator=generator, num_inference_steps=2, **arguments)


def test_flux(asked: list[Line], checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The figures are those of the two pipelines, called here."""
    source = checkpoints("flux")
    result = quantized(source, tmp_path / "out")
    wishes: dict[str, Any] = {"source": str(source), "prompts": prompts(tmp_path), "steps": 2, "size": "32x32"}
    report = aoconvert.evaluate(result, **wishes)
    assert [request["role"] for request in asked] == ["original", "quantized"]
    [part] = report.components
    latents = [call(at, height=32, width=32, output_type="latent").images.double() for at in (source, result)]
    error = float((latents[0] - latents[1]).norm() / latents[0].norm())
    assert part.metrics.latents_relative_error == pytest.approx(error, rel=1e-6)
    images = [np.asarray(call(at, height=32, width=32).images[0], np.float64) for at in (source, result)]
    psnr = 10 * math.log10(255**2 / np.square(images[0] - images[1]).mean())
    assert part.metrics.psnr_mean == pytest.approx(psnr, rel=1e-4)
    assert part.metrics.ssim_mean is not None and 0 < part.metrics.ssim_mean < 1
    # int8 loses more than rounding to bfloat16 does
    floor = part.noise_floor
    assert floor.output_sqnr_db is not None and part.metrics.output_sqnr_db is not None
    assert floor.output_sqnr_db > part.metrics.output_sqnr_db > 20
    assert floor.psnr_mean is not None and floor.latents_relative_error is not None
    assert [step.call for step in part.steps] == [0, 1]
    assert {layer.name for layer in part.layers} >= {"transformer_blocks.0.attn.to_q", "proj_out"}
    assert [figure.name for figure in part.skipped_figures] == ["lpips_mean"]
    assert report.data.detail == "1 prompt, seed 1, 2 steps, 32x32"
    assert report.command.endswith("--prompts prompts.txt --steps 2 --size 32x32")
    assert report.peak_bytes is not None and report.peak_bytes.keys() == {"original", "quantized"}
    assert read_evaluation(result / "aoconvert.eval.json") == report
    check_document("eval", report.to_dict())
    sheet = Image.open(io.BytesIO((result / "eval.png").read_bytes()))
    assert sheet.size == (3 * 384 + 4 * 4, 30 + 384 + 28 + 4)
    # the same once more runs neither of them on a sample again
    again = aoconvert.evaluate(result, **wishes)
    assert (again.components, again.reused, asked[-1]["samples"]) == (report.components, 1, [])


def test_the_denoiser_gets_what_the_original_was_given(
    asked: list[Line], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoints("flux")
    result = quantized(source, tmp_path / "out")
    report = aoconvert.evaluate(
        result, source=str(source), prompts=prompts(tmp_path), steps=6, size="32x32", noise_floor=False, layers=False
    )
    [part] = report.components
    kept = sorted((tmp_path / "cache" / "eval").glob("*/calls-0000/*.pt"))
    assert [path.name for path in kept] == [f"transformer-{number:04d}.pt" for number in (0, 2, 3, 5)]
    model = diffusers.FluxTransformer2DModel.from_pretrained(result / "transformer", torch_dtype=torch.bfloat16)
    for path, step in zip(kept, part.steps, strict=True):
        given = torch.load(path, weights_only=True)
        with torch.no_grad():
            after = model(*given["args"], **given["kwargs"])[0].double().flatten()
        before = given["output"].double().flatten()
        sqnr = 20 * math.log10(float(before.norm() / (before - after).norm()))
        assert step.output_sqnr_db == pytest.approx(sqnr, rel=1e-6)
        assert step.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(before, after, 0)), abs=1e-9)
    assert part.noise_floor.model_dump(exclude_none=True) == {}
    assert part.layers == ()


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["flux", "cogvideox"])
def test_more_bits_are_better(family: str, asked: list[Line], checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints(family)
    found = []
    for scheme in ("int8wo", "int4wo", "intx2wo"):
        result = quantized(source, tmp_path / scheme, scheme)
        [part] = aoconvert.evaluate(result, source=str(source), prompts=prompts(tmp_path), steps=2).components
        found.append(part.metrics)
    assert [request["role"] for request in asked].count("original") == 1
    for name, sign in (("output_sqnr_db", -1), ("cosine_mean", -1), ("latents_relative_error", 1)):
        values = [sign * getattr(metrics, name) for metrics in found]
        assert values == sorted(values), name


def test_a_pipeline_beside_itself(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The program itself on the same pipeline twice: all is equal, and what is infinite is absent."""
    from aoconvert.evaluation.children import eval_child, pipeline_child

    source = checkpoints("flux")
    code = "import torch\nfrom diffusers import DiffusionPipeline\n"
    code += f"pipe = DiffusionPipeline.from_pretrained({str(source)!r}, torch_dtype=torch.bfloat16)"
    wishes = {"prompts": ["a panda"], "own_prompts": True, "seeds": 1, "seed": 1, "steps": 2, "size": [32, 32]}
    request: dict[str, Any] = {
        "root": str(source), "variant": None, "trust": False, "dtype": "bfloat16", "alone": None, "device": "cpu",
        "parts": {"transformer": "denoiser"}, "noise": False, "rows": 8, "lpips": False, "wishes": wishes,
        "folder": str(tmp_path), "nbytes": 1, "samples": [0], "layers": {}, "result": str(tmp_path / "result"),
        "code": code,
    }  # fmt: skip
    lines: list[Line] = []
    for role in ("original", "quantized"):
        eval_child.answer({**request, "role": role}, lines.append, pipeline_child.RUNS)
    [figures] = [line["figures"] for line in lines if "figures" in line]
    assert (figures["frames"], figures["psnr"], figures["ssim"]) == (1, [], [1.0])
    assert figures["latents"][1] == 0 < figures["latents"][0]
    assert [(call["cosine"], call["noise"]) for call in figures["calls"]["transformer"]] == [([1.0], 0.0)] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a panda\n\na dog\n", "prompts.txt: line 2 is empty"),
        ("", "line 1 is empty"),
        (b"\xff", "is not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_prompts_that_cannot_be_used(text: str | bytes | None, said: str, tmp_path: Path) -> None:
    from aoconvert.evaluation.pipelines import read_prompts

    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(aoconvert.UsageError, match=said):
        read_prompts(path)


def test_bad_input_is_refused_before_any_work(asked: list[Line], checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("flux")
    result = quantized(source, tmp_path / "out")
    text = prompts(tmp_path)
    with pytest.raises(aoconvert.UsageError, match="--text is for language models"):
        aoconvert.evaluate(result, source=str(source), text=[text])
    with pytest.raises(aoconvert.PlanError, match=r"--max-lpips: LPIPS needs .*nothing is fetched"):
        aoconvert.evaluate(result, source=str(source), max_lpips=0.1)
    with pytest.raises(aoconvert.UsageError, match="--max-kl does not apply"):
        aoconvert.evaluate(result, source=str(source), max_kl=0.1)
    with pytest.raises(aoconvert.UsageError, match="is not WIDTHxHEIGHT"):
        aoconvert.evaluate(result, source=str(source), size="32")
    model = quantized(checkpoints("llama-tied"), tmp_path / "llama")
    with pytest.raises(aoconvert.UsageError, match="--prompts is for pipelines"):
        aoconvert.evaluate(model, source=str(checkpoints("llama-tied")), prompts=text)
    assert asked == []
    with pytest.raises(aoconvert.UsageError, match=r"cannot be called at --size 1x1: "):
        aoconvert.evaluate(result, source=str(source), size="1x1", steps=1)
    assert not (result / "aoconvert.eval.json").exists()


def test_latents_that_are_nan_are_named(asked: list[Line], checkpoints: Checkpoints, tmp_path: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoints("flux"), torch_dtype=torch.bfloat16)
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(math.nan)
    pipe.save_pretrained(tmp_path / "source")
    result = quantized(tmp_path / "source", tmp_path / "out")
    with pytest.raises(aoconvert.SourceError, match="the latents of the original pipeline are not finite"):
        aoconvert.evaluate(result, source=str(tmp_path / "source"), prompts=prompts(tmp_path), steps=1)
    assert not (result / "aoconvert.eval.json").exists()


def test_a_denoiser_alone_runs_in_the_pipeline_of_its_original(
    asked: list[Line], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = checkpoints("flux")
    result = quantized(source, tmp_path / "out", component_only=True)
    wishes: dict[str, Any] = {"steps": 1, "prompts": prompts(tmp_path), "noise_floor": False}
    report = aoconvert.evaluate(result, source=str(source), min_psnr=1.0, min_cosine=0.5, **wishes)
    [part] = report.components
    assert (part.name, part.task) == ("", "denoiser")
    assert part.metrics.psnr_mean is not None and part.layers and part.steps
    assert [(gate.name, gate.passed) for gate in report.gates] == [("min-cosine", True), ("min-psnr", True)]


@pytest.mark.exhaustive
def test_a_video_is_shown_by_three_of_its_frames(asked: list[Line], checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("cogvideox")
    result = quantized(source, tmp_path / "out")
    report = aoconvert.evaluate(
        result, source=str(source), prompts=prompts(tmp_path), steps=1, layers=False, noise_floor=False, seeds=2
    )
    assert report.data.samples == 2
    sheet = Image.open(result / "eval.png")
    assert sheet.size[1] == 30 + 6 * (384 + 28 + 4)
    [kept] = (tmp_path / "cache" / "eval").glob("*/sample-0001.safetensors")
    assert load_file(kept)["pictures"].shape == (9, 64, 64, 3)
    assert (result / "eval.png").stat().st_size < 3_000_000


def test_a_run_that_was_stopped_goes_on_with_the_next_sample(
    asked: list[Line], checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aoconvert.evaluation.children import pipeline_child

    class Stopped(BaseException):
        pass

    ran: list[str] = []
    run_pipeline = pipeline_child.run_pipeline

    def interrupted(pipe: Any, arguments: Any, sample: Any, whose: str) -> Any:
        ran.append(whose)
        if len(ran) in (2, 4):  # the second sample of the original, and of the result
            raise Stopped
        return run_pipeline(pipe, arguments, sample, whose)

    monkeypatch.setattr(pipeline_child, "run_pipeline", interrupted)
    source = checkpoints("flux")
    # the text encoder is quantized, too: it gets the figures of an encoder, and the pictures are the denoiser's
    result = quantized(source, tmp_path / "out", components=["transformer", "text_encoder_2"])
    wishes: dict[str, Any] = {"steps": 1, "size": "32x32", "noise_floor": False, "seeds": 2}
    wishes |= {"source": str(source), "prompts": prompts(tmp_path)}
    for _ in range(2):
        with pytest.raises(Stopped):
            aoconvert.evaluate(result, **wishes)
    assert not (result / "aoconvert.eval.json").exists()
    report = aoconvert.evaluate(result, **wishes)
    assert ran == ["original"] * 3 + ["quantized"] * 3
    assert report.data.samples == 2
    parts = {part.name: part for part in report.components}
    assert parts["text_encoder_2"].task == "encoder"
    assert parts["text_encoder_2"].metrics.cosine_tokens_min is not None
    assert parts["text_encoder_2"].metrics.psnr_mean is None
    assert parts["transformer"].metrics.psnr_mean is not None
    assert all(part.steps and part.layers for part in parts.values())


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["pixart", "sd3", "wan"])
def test_other_pipelines(family: str, asked: list[Line], checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints(family)
    result = quantized(source, tmp_path / "out")
    report = aoconvert.evaluate(result, source=str(source), prompts=prompts(tmp_path), steps=2)
    [part] = report.components
    assert part.metrics.psnr_mean is not None and part.metrics.latents_relative_error is not None
    assert part.metrics.cosine_min is not None and part.metrics.cosine_min > 0.9
    assert part.noise_floor.ssim_mean is not None
    assert part.steps and part.layers
    assert (result / "eval.png").is_file()
