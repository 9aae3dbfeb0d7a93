"""Evaluate a pipeline: the original runs first, in a fresh interpreter, and then the result in another."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from aoconvert.checkpoint.checkpoint import Part
from aoconvert.checkpoint.evaluation import (
    ComponentFigures,
    DataFile,
    EvalData,
    LayerFigures,
    Metrics,
    SkippedFigure,
    SkippedLayer,
    StepFigures,
)
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.load_code import card_strategy, load_code
from aoconvert.checkpoint.manifest import SHEET_NAME
from aoconvert.environment import versions
from aoconvert.errors import PlanError, SourceError, UsageError
from aoconvert.evaluation import children, pictures
from aoconvert.evaluation.asking import ask, read_limits
from aoconvert.evaluation.figures import SampleFigures, relative_error, summarize
from aoconvert.evaluation.job import Job
from aoconvert.evaluation.models import ROWS, Measured, packing_of, with_weight
from aoconvert.evaluation.references import References, open_references, write_json
from aoconvert.evaluation.sheet import MOST_ROWS, Pair, choose_frames, draw_sheet
from aoconvert.files import write_whole
from aoconvert.verification.process import Children

PROMPTS = ("a panda plays a guitar in a bamboo forest", "a red bicycle leans against a yellow wall")
"""What pipelines are given where the user has no prompts."""

_PROGRAM = "pipeline_child"


def measure_pipeline(job: Job) -> Measured:
    """Run both pipelines on the same prompts and seeds, and the quantized models on the original's inputs.

    Raises:
        SourceError: the original cannot be run, or gives what is not finite.
        VerificationError: the result cannot be run, or gives what is not finite.
        UsageError: prompts or a size that the pipeline does not take.
        PlanError: a package is missing, or there is no pipeline.
    """
    _require_packages(job)
    request = _request(job)
    with open_references(_facts(job, request)) as kept, Children(read_limits(), children.FOLDER) as running:
        request["folder"] = str(kept.folder)
        data = kept.data()
        reused = len(kept.done(data["samples"])) if data is not None else 0
        if data is None or reused < data["samples"]:
            data = _run_original(job, request, kept, running)
        figures, layers, peak = _run_quantized(job, request, data, kept, running)
        samples = [figures[number] for number in range(data["samples"])]
        floor = [kept.noise_floor(number) or {} for number in range(data["samples"])]
        if job.writes:
            _write_sheet(job, data, kept)
    if job.options.min_psnr is not None and not any(sample.get("frames") for sample in samples):
        raise UsageError("--min-psnr does not apply: the pipeline makes no pictures", hint="use --min-cosine")
    return Measured(
        _describe_data(job, data),
        tuple(_describe_part(job, part, samples, floor, layers) for part in job.target.parts),
        request["dtype"],
        reused,
        peak,
    )


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Read prompts, one on each line; without a file there are two.

    Raises:
        UsageError: it cannot be read, or a line is empty.
    """
    if path is None:
        return PROMPTS
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {path} is not UTF-8 text (byte {error.start})") from error
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UsageError(f"--prompts {path}: line {number} is empty", hint="give one prompt on each line")
    return tuple(line.strip() for line in lines)


def _require_packages(job: Job) -> None:
    if (missing := pictures.missing_package()) is not None:
        raise PlanError([missing], hint="pip install 'aoconvert[eval]'")
    if job.options.max_lpips is not None and (missing := pictures.missing_lpips()) is not None:
        raise PlanError([f"--max-lpips: {missing}; nothing is fetched for it"], hint="omit --max-lpips")


def _request(job: Job) -> dict[str, Any]:
    """What both programs are asked."""
    options = job.options
    for part in job.target.parts:
        if part.name not in job.originals:
            raise SourceError(f"{job.source.label}: nothing says how the library opens the original")
    how = next(iter(job.originals.values()))
    alone: str | None = None
    root = job.source.root / (job.manifest.source.subfolder or "")
    if job.target.kind != "pipeline":
        root, alone = Path(how["folder"]).parent, Path(how["folder"]).name
        if not (root / "model_index.json").is_file():
            raise PlanError(
                [f"{job.target.class_name} and its original are models alone: there is no pipeline to run them in"],
                hint="--source names the pipeline that it belongs to",
            )
    dtypes = {part.kwargs.get("torch_dtype", part.dtype) for part in job.target.parts} - {None}
    return {
        "root": str(root.resolve()),
        "variant": how["variant"],
        "trust": options.trust_remote_code,
        "dtype": str(dtypes.pop()) if len(dtypes) == 1 else None,
        "alone": alone,
        "device": job.device,
        "parts": {alone or part.name: job.tasks[part.name] for part in job.target.parts},
        "noise": options.noise_floor,
        "rows": ROWS,
        "lpips": pictures.missing_lpips() is None,
        "wishes": {
            "prompts": list(read_prompts(options.prompts)),
            "own_prompts": options.prompts is not None,
            "seeds": options.seeds,
            "seed": options.seed,
            "steps": options.steps,
            "size": list(options.width_and_height) if options.width_and_height is not None else None,
        },
    }


def _facts(job: Job, request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the outputs of the original depend on; parts that were not quantized by size and time."""
    others = {}
    for path, file in sorted(job.source.files().items()):
        place = Path(job.source.root) / path
        stamp = place.stat().st_mtime_ns if file.sha256 is None and place.is_file() else None
        others[path] = [file.size, file.sha256, stamp]
    known = {name: value for name, value in request.items() if name not in ("root", "trust")}
    return {"source": job.source_facts(), "files": others, "request": known, "versions": versions()}


def _run_original(job: Job, request: dict[str, Any], kept: References, running: Children) -> dict[str, Any]:
    asked = {**request, "role": "original", "nbytes": job.source.nbytes}
    passes = len(request["wishes"]["prompts"]) * job.options.seeds
    answers = ask(job, "original", running, asked, job.source.nbytes, passes, program=_PROGRAM)
    write_json(kept.folder / "peak.json", {"peak_bytes": _peak(answers)})
    data = kept.data()
    assert data is not None
    return data


def _run_quantized(
    job: Job, request: dict[str, Any], data: Mapping[str, Any], kept: References, running: Children
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
    """The figures of each sample and of each layer, and the memory of both pipelines."""
    place = kept.result(job.manifest_sha256)
    earlier = {number: References(place).noise_floor(number) for number in range(data["samples"])}
    found = {number: figures for number, figures in earlier.items() if figures is not None}

    def keep(line: Mapping[str, Any]) -> None:
        write_json(place / f"sample-{line['sample']:04d}.json", line["figures"])

    asked = {
        **request,
        "role": "quantized",
        "code": load_code(
            job.target, str(job.folder.resolve()), card_strategy(job.target), device=job.device.removesuffix(":all")
        ),
        "nbytes": job.target.nbytes,
        "samples": [number for number in range(data["samples"]) if number not in found],
        "result": str(place),
        "layers": {request["alone"] or part.name: packing_of(job, part) for part in job.target.parts}
        if job.options.layers
        else {},
    }
    nbytes = job.target.nbytes
    answers = ask(job, "quantized", running, asked, nbytes, len(asked["samples"]), keep, program=_PROGRAM)
    found |= {line["sample"]: line["figures"] for line in answers if "figures" in line}
    layers = [
        {**line["layer"], "part": "" if request["alone"] else line["part"]} for line in answers if "layer" in line
    ]
    before = References(kept.folder).read("peak.json") or {}
    peak = {"original": before["peak_bytes"]} if "peak_bytes" in before else {}
    return found, layers, {**peak, "quantized": _peak(answers)}


def _peak(answers: Iterable[Mapping[str, Any]]) -> int:
    return next(int(line["peak_bytes"]) for line in answers if "peak_bytes" in line)


def _describe_part(
    job: Job,
    part: Part,
    samples: Sequence[Mapping[str, Any]],
    floor: Sequence[Mapping[str, Any]],
    layers: Sequence[Mapping[str, Any]],
) -> ComponentFigures:
    own = [{key: value for key, value in line.items() if key != "part"} for line in layers if line["part"] == part.name]
    pictured = job.tasks[part.name] == "denoiser" or "denoiser" not in job.tasks.values()
    return ComponentFigures(
        name=part.name,
        class_name=part.class_name,
        task=job.tasks[part.name],
        metrics=_summarize(part, samples, pictured=pictured),
        noise_floor=_summarize(part, [found for found in floor if found], pictured=pictured),
        layers=tuple(LayerFigures(**with_weight(part, line)) for line in own if "reason" not in line),
        skipped_layers=tuple(SkippedLayer(**line) for line in own if "reason" in line),
        steps=tuple(_list_steps(part, samples)),
        skipped_figures=tuple(_list_skipped(part, samples)) if pictured else (),
    )


def _calls(part: Part, sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls: Mapping[str, list[Mapping[str, Any]]] = sample["calls"]
    return calls[part.name] if part.name else next(iter(calls.values()))


def _summarize(part: Part, samples: Sequence[Mapping[str, Any]], *, pictured: bool) -> Metrics:
    """The figures of a model's calls; with ``pictured`` those of the whole pipeline's latents and pictures, too."""
    calls = [call for sample in samples for call in _calls(part, sample)]
    found = summarize(
        SampleFigures(**{name: value for name, value in call.items() if name != "call"}) for call in calls
    ).model_dump(exclude_none=True)
    if pictured:
        latents = [sample["latents"] for sample in samples if "latents" in sample]
        error = relative_error(*(math.fsum(pair[at] for pair in latents) for at in (0, 1)))
        if "output_relative_error" in error:
            found["latents_relative_error"] = error["output_relative_error"]
        for name in ("psnr", "ssim", "lpips"):
            if values := [value for sample in samples for value in sample.get(name, ())]:
                found[f"{name}_mean"] = math.fsum(values) / len(values)
                if name == "psnr":
                    found["psnr_min"] = min(values)
    return Metrics(**found)


def _list_steps(part: Part, samples: Sequence[Mapping[str, Any]]) -> Iterator[StepFigures]:
    for number, sample in enumerate(samples):
        for call in _calls(part, sample):
            error = relative_error(call["signal"], call["noise"])
            cosine = math.fsum(call["cosine"]) / len(call["cosine"])
            yield StepFigures(
                sample=number, call=call["call"], cosine=cosine, output_sqnr_db=error.get("output_sqnr_db")
            )


def _list_skipped(part: Part, samples: Sequence[Mapping[str, Any]]) -> Iterator[SkippedFigure]:
    if not any(_calls(part, sample) for sample in samples):
        yield SkippedFigure(name="cosine_mean", reason="the pipeline does not call this model as a whole")
    if not any("latents" in sample for sample in samples):
        yield SkippedFigure(name="latents_relative_error", reason="the pipeline's scheduler makes no latents")
    frames = sum(sample.get("frames", 0) for sample in samples)
    if not frames:
        for name in ("psnr_mean", "psnr_min", "ssim_mean", "lpips_mean"):
            yield SkippedFigure(name=name, reason="the pipeline makes no pictures")
        return
    if not any(sample["psnr"] for sample in samples):
        for name in ("psnr_mean", "psnr_min"):
            yield SkippedFigure(name=name, reason="infinite: all pictures are equal to the original's")
    if not any(sample["ssim"] for sample in samples):
        yield SkippedFigure(name="ssim_mean", reason="the pictures are smaller than its window")
    if not any(sample.get("lpips") for sample in samples):
        yield SkippedFigure(name="lpips_mean", reason=pictures.missing_lpips() or "it was not computed")


def _describe_data(job: Job, data: Mapping[str, Any]) -> EvalData:
    path = job.options.prompts
    return EvalData(
        kind=data["kind"],
        sha256=data["sha256"],
        samples=data["samples"],
        detail=data["detail"],
        seed=job.options.seed,
        files=(DataFile(name=path.name, sha256=file_sha256(path)),) if path is not None else (),
    )


def _write_sheet(job: Job, data: Mapping[str, Any], kept: References) -> None:
    """Put the contact sheet beside the manifest; an earlier one goes where there are no pictures."""
    pairs: list[Pair] = []
    for number, sample in enumerate(data["shown"]):
        before = kept.folder / f"sample-{number:04d}.safetensors"
        after = kept.result(job.manifest_sha256) / f"pictures-{number:04d}.safetensors"
        if len(pairs) >= MOST_ROWS or not after.is_file():
            break
        found = [load_file(path)["pictures"] for path in (before, after)]
        count = len(found[0])
        for frame in choose_frames(count):
            which = f", frame {frame + 1} of {count}" if count > 1 else ""
            caption = f"seed {sample['seed']}{which}" + (f": {sample['prompt']}" if sample["prompt"] else "")
            pairs.append(Pair(caption, found[0][frame], found[1][frame]))
    place = job.folder / SHEET_NAME
    with contextlib.suppress(OSError):  # as the report, which then says that it is not written
        if pairs:
            write_whole(place, draw_sheet(pairs))
        else:
            place.unlink(missing_ok=True)
