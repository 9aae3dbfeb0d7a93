"""An evaluation as ``aoconvert.eval.json`` holds it: one model, written by eval, read by card, push and auto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from aoconvert.checkpoint.files import belongs
from aoconvert.checkpoint.json_model import Date, JsonModel, read_json_model
from aoconvert.checkpoint.manifest import EVAL_NAME
from aoconvert.errors import VerificationError
from aoconvert.json_text import INDEX_BYTES

Task = Literal["causal-lm", "seq2seq", "encoder", "classifier", "denoiser"]
DataKind = Literal["text", "generated", "random-tokens", "inputs", "prompts"]

SCHEMA_VERSION: Literal[1] = 1


class Metrics(JsonModel):
    """How far the outputs are from the original's; a figure that does not apply, or is infinite, is absent."""

    kl_mean: float | None = Field(default=None, description="KL(original‖quantized) for each token, in nats: mean")
    kl_median: float | None = None
    kl_p90: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = Field(
        default=None, description="fraction of tokens whose most likely value is the same"
    )
    perplexity_source: float | None = Field(
        default=None, description="exp of the mean negative log-likelihood, original"
    )
    perplexity: float | None = Field(default=None, description="the same of the quantized model")
    cosine_mean: float | None = Field(
        default=None,
        description="cosine of pooled outputs (the mean over the tokens), or of a denoiser's whole outputs: mean",
    )
    cosine_min: float | None = None
    cosine_tokens_mean: float | None = Field(default=None, description="cosine of the outputs of each token: mean")
    cosine_tokens_min: float | None = None
    output_relative_error: float | None = Field(
        default=None, description="‖original − quantized‖ / ‖original‖ of the outputs"
    )
    output_sqnr_db: float | None = Field(
        default=None, description="−20·log10(output_relative_error); absent where that is 0"
    )
    latents_relative_error: float | None = Field(
        default=None, description="‖original − quantized‖ / ‖original‖ of the final latents, each pipeline by itself"
    )
    psnr_mean: float | None = Field(
        default=None, description="dB, of 8-bit pictures or frames that are not equal; absent where all are equal"
    )
    psnr_min: float | None = None
    ssim_mean: float | None = None
    lpips_mean: float | None = None


class LayerFigures(JsonModel):
    """A quantized layer: the error of its outputs, on inputs that the original sees, and of its weight."""

    name: str
    output_sqnr_db: float | None = Field(
        default=None, description="−20·log10(‖XW−XŴ‖/‖XW‖); absent where they are equal"
    )
    weight_sqnr_db: float | None = None
    sensitivity: float | None = Field(
        default=None,
        description="expected mean KL in nats (of an encoder: squared relative error of the outputs) for each unit of "
        "the weight's squared relative error, from gradients of the original; absent in pipelines",
    )


class SkippedLayer(JsonModel):
    """A quantized tensor without a figure, and why."""

    name: str
    reason: str


class StepFigures(JsonModel):
    """One call of a model in a pipeline, on what the original was given there."""

    sample: int
    call: int = Field(description="which of the model's calls for this sample, from 0")
    output_sqnr_db: float | None = Field(default=None, description="absent where the outputs are equal")
    cosine: float


class SkippedFigure(JsonModel):
    """A figure that is absent, and why."""

    name: str
    reason: str


class ComponentFigures(JsonModel):
    """One quantized model."""

    name: str
    class_name: str
    task: Task
    metrics: Metrics
    noise_floor: Metrics = Field(description="the same figures of the original with noise like bfloat16 rounding in it")
    layers: tuple[LayerFigures, ...] = ()
    skipped_layers: tuple[SkippedLayer, ...] = ()
    steps: tuple[StepFigures, ...] = Field(default=(), description="of a model in a pipeline")
    skipped_figures: tuple[SkippedFigure, ...] = ()


class GateResult(JsonModel):
    """A limit, and whether it was kept."""

    name: str
    limit: float
    value: float | None = Field(default=None, description="absent where it is infinite")
    passed: bool


class DataFile(JsonModel):
    """A file of text, without its folder."""

    name: str
    sha256: str


class EvalData(JsonModel):
    """What was put into both models."""

    kind: DataKind
    sha256: str = Field(description="of the tokens, or of the tensors, that both models were given")
    samples: int
    tokens: int | None = Field(default=None, description="how many tokens were judged; absent for a pipeline")
    detail: str = Field(description="one sentence about where the data comes from")
    seed: int
    files: tuple[DataFile, ...] = ()


class EvalSource(JsonModel):
    """The original."""

    label: str
    repo_id: str | None = None
    revision: str | None = None
    dtype: str | None = Field(default=None, description="of its weights, in which it ran")
    same_files: bool | None = Field(
        default=None, description="whether its weights files are the ones that were quantized"
    )


class Evaluation(JsonModel):
    """How much a checkpoint lost, paired with its original.

    Attributes:
        ok: every gate was kept.
        path: as the user named it.
        reused: samples whose outputs of the original were there from an earlier run.
        peak_bytes: largest amount of memory that each pipeline took of its own, by ``original`` and ``quantized``.
        command: what gives the same figures again.
        unwritten: why the report is not in the folder; ``None`` where it is. Never written.
    """

    schema_version: Literal[1]
    ok: bool
    path: str
    source: EvalSource
    environment: dict[str, str]
    data: EvalData
    components: tuple[ComponentFigures, ...]
    gates: tuple[GateResult, ...]
    reused: int
    peak_bytes: dict[str, int] | None = None
    command: str
    date: Date
    manifest_sha256: str
    unwritten: SkipJsonSchema[str | None] = Field(default=None, exclude=True)

    @property
    def exit_code(self) -> int:
        """What a command that evaluated exits with."""
        return 0 if self.ok else VerificationError.exit_code

    def to_dict(self) -> dict[str, Any]:
        """Give what ``eval --json`` prints and ``aoconvert.eval.json`` holds; the keys are a contract."""
        return self.model_dump(mode="json", exclude_none=True)

    def dump(self) -> str:
        """Write the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_evaluation(path: Path) -> Evaluation:
    """Read a report, which anybody may have written.

    Raises:
        OSError: there is none (``FileNotFoundError``), or it cannot be read.
        ValueError: it is not a report of an evaluation.
    """
    return read_json_model(Evaluation, path, INDEX_BYTES)


def evaluation_of(folder: Path) -> Evaluation | None:
    """Find the report in a folder that belongs to the manifest beside it."""
    try:
        return belongs(read_evaluation(folder / EVAL_NAME), folder)
    except (OSError, ValueError):
        return None
