"""Reports as ``eval`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
