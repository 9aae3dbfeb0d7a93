"""Evaluate a model of transformers: the original runs first, in a fresh interpreter, and then the result in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aoconvert.checkpoint.checkpoint import Part
from aoconvert.checkpoint.evaluation import (
    ComponentFigures,
    DataFile,
    EvalData,
    LayerFigures,
    Metrics,
    SkippedFigure,
    SkippedLayer,
)
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.load_code import card_strategy, load_code
from aoconvert.environment import versions
from aoconvert.errors import SourceError
from aoconvert.evaluation import children
from aoconvert.evaluation.asking import ask, read_limits
from aoconvert.evaluation.figures import SampleFigures, summarize
from aoconvert.evaluation.job import Job
from aoconvert.evaluation.references import References, open_references, write_json
from aoconvert.schemes import int4
from aoconvert.verification.process import Children

ROWS = 128
"""Rows of the input of a layer that are kept, of all samples together."""


@dataclass(frozen=True)
class Measured:
    """What came out.

    Attributes:
        data: what was put into both models.
        components: the figures of each part.
        dtype: in which the original ran.
        reused: samples whose outputs of the original were there already.
        peak_bytes: see ``Evaluation``.
    """

    data: EvalData
    components: tuple[ComponentFigures, ...]
    dtype: str | None
    reused: int
    peak_bytes: dict[str, int] | None = None


def measure_model(job: Job) -> Measured:
    """Run both models on the same inputs.

    Raises:
        SourceError: the original cannot be run, or its output is not finite.
        VerificationError: the result cannot be run, or its output is not finite.
        UsageError: the text is too short, or there is no tokenizer for it.
        PlanError: there is not enough memory.
    """
    [part] = job.target.parts
    if part.name not in job.originals:
        raise SourceError(f"{job.source.label}: nothing says how the library opens the original")
    with open_references(_facts(job, part)) as kept, Children(read_limits(), children.FOLDER) as running:
        data = kept.data()
        before = kept.done(data["samples"]) if data is not None else []
        if data is None or len(before) < data["samples"]:
            data = _run_original(job, part, kept, running)
        figures, layers = _run_quantized(job, part, data, kept, running)
        samples = [figures[number] for number in range(data["samples"])]
        floor = [kept.noise_floor(number) or {} for number in range(data["samples"])]
        sensitivity = kept.sensitivity() or {}
    known = sensitivity.get("layers", {})
    component = ComponentFigures(
        name=part.name,
        class_name=part.class_name,
        task=job.tasks[part.name],
        metrics=summarize(SampleFigures(**found) for found in samples),
        noise_floor=_noise_floor(job, floor),
        layers=tuple(
            LayerFigures(**with_weight(part, line), sensitivity=known.get(line["name"]))
            for line in layers
            if "reason" not in line
        ),
        skipped_layers=tuple(SkippedLayer(**line) for line in layers if "reason" in line),
        skipped_figures=(SkippedFigure(name="sensitivity", reason=sensitivity["reason"]),)
        if job.options.layers and "reason" in sensitivity
        else (),
    )
    return Measured(_describe_data(job, data, samples), (component,), data["dtype"], len(before))


def _facts(job: Job, part: Part) -> dict[str, Any]:
    """Everything that the outputs of the original depend on."""
    options = job.options
    how = job.originals[part.name]
    return {
        "source": job.source_facts(),
        "model": [how[key] for key in ("class_name", "auto_class", "variant")] + [job.tasks[part.name]],
        "text": [file_sha256(path) for path in options.text],
        "wishes": [options.samples, options.tokens, options.seed],
        "device": job.device,
        "rows": ROWS,
        "noise": options.noise_floor,
        "versions": versions(),
    }


def _run_original(job: Job, part: Part, kept: References, running: Children) -> dict[str, Any]:
    options = job.options
    how = dict(job.originals[part.name])
    request = {
        "role": "original",
        "how": how,
        "device": job.device,
        "task": job.tasks[part.name],
        "folder": str(kept.folder),
        "rows": ROWS,
        "noise": options.noise_floor,
        "wishes": {
            "task": job.tasks[part.name],
            "text": [str(path.resolve()) for path in options.text],
            "samples": options.samples,
            "tokens": options.tokens,
            "seed": options.seed,
            "folder": how["folder"],
            "trust": options.trust_remote_code,
        },
    }
    ask(job, "original", running, request, job.source.nbytes, options.samples)
    data = kept.data()
    assert data is not None
    return data


def _run_quantized(
    job: Job, part: Part, data: Mapping[str, Any], kept: References, running: Children
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """The figures of each sample, and of each layer; those of an earlier run that was stopped are taken."""
    place = kept.result(job.manifest_sha256)
    found: dict[int, dict[str, Any]] = {}
    for number in range(data["samples"]):
        if (earlier := References(place).noise_floor(number)) is not None:
            found[number] = earlier

    def keep(line: Mapping[str, Any]) -> None:
        if "figures" in line:
            write_json(place / f"sample-{line['sample']:04d}.json", line["figures"])

    request: dict[str, Any] = {
        "role": "quantized",
        "code": load_code(
            job.target, str(job.folder.resolve()), card_strategy(job.target), device=job.device.removesuffix(":all")
        ),
        "device": job.device,
        "nbytes": job.target.nbytes,
        "task": job.tasks[part.name],
        "folder": str(kept.folder),
        "samples": [number for number in range(data["samples"]) if number not in found],
        "layers": packing_of(job, part) if job.options.layers else {},
    }
    answers = ask(job, "quantized", running, request, job.target.nbytes, len(request["samples"]), keep)
    found |= {line["sample"]: line["figures"] for line in answers if "figures" in line}
    return found, [line["layer"] for line in answers if "layer" in line]


def packing_of(job: Job, part: Part) -> dict[str, str | None]:
    """Quantized tensor → the layout of int4 that is packed for a CPU."""
    pairs = zip(job.target.parts, job.manifest.components, strict=True)  # a part alone has no name in the target
    entry = next(entry for own, entry in pairs if own.name == part.name)
    layout = int4.cpu_layout(entry.layout.packing)
    return {tensor.name: layout for tensor in entry.tensors if tensor.action == "quantize"}


def _noise_floor(job: Job, figures: Sequence[Mapping[str, Any]]) -> Metrics:
    if not job.options.noise_floor:
        return Metrics()
    return summarize(SampleFigures(**found) for found in figures if found)


def with_weight(part: Part, line: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a layer with the SQNR of its weight."""
    tensors = part.tensors or {}
    entry = tensors.get(f"{line['name']}.weight") or tensors.get(line["name"])  # a stack of experts
    return {**line, "weight_sqnr_db": entry.sqnr_db if entry is not None else None}


def _describe_data(job: Job, data: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> EvalData:
    return EvalData(
        kind=data["kind"],
        sha256=data["sha256"],
        samples=data["samples"],
        tokens=sum(len(found["kl"]) or len(found["cosine_tokens"]) for found in samples),
        detail=data["detail"],
        seed=job.options.seed,
        files=tuple(DataFile(name=path.name, sha256=file_sha256(path)) for path in job.options.text),
    )
