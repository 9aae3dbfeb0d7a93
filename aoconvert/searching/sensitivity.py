"""How much an error in a weight matters to what the model gives, from the report of an evaluation.

An evaluation measured, on the original, what a relative error of each layer's weight would do to the model's output
(``LayerFigures.sensitivity``): that belongs to the layer and not to a scheme. So the loss by another scheme is
estimated as the squared relative error of the weight that it makes, times that.

Where that is not known (pipelines, very large stacks of experts), the error of the layer's own outputs stands in for
the model's: the evaluation measured, for one scheme, the error of the weight and that of the layer's outputs; their
ratio belongs to the layer, too. Where it is known of other layers of the model, the ratio is brought to their unit by
their median.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.checkpoint.evaluation import ComponentFigures, read_evaluation
from aoconvert.errors import PlanError, UsageError
from aoconvert.humanize import first, plural

if TYPE_CHECKING:
    from aoconvert.searching.goals import Tensor

Ratios = Mapping[tuple[str, str], float]
"""Component and layer → loss, or squared relative error of the layer's outputs, over that of the weight."""


def read_sensitivity(path: Path) -> Ratios:
    """Read the ratios of all layers that were measured.

    Raises:
        UsageError: the file is not a report of an evaluation, or has no figure of a layer.
    """
    try:
        report = read_evaluation(path)
    except OSError as error:
        raise UsageError(f"--sensitivity {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(
            f"--sensitivity {path} is not a report of aoconvert eval", hint="aoconvert.eval.json"
        ) from error
    found = {(part.name, name): ratio for part in report.components for name, ratio in _ratios(part).items()}
    if not found:
        raise UsageError(f"--sensitivity {path} has no error of a layer's outputs", hint="run eval without --no-layers")
    return found


def _ratios(part: ComponentFigures) -> dict[str, float]:
    """Each layer's own figure in one unit."""
    outputs = {
        layer.name: 10 ** ((layer.weight_sqnr_db - layer.output_sqnr_db) / 10)
        for layer in part.layers
        if layer.weight_sqnr_db is not None and layer.output_sqnr_db is not None
    }
    known = {layer.name: layer.sensitivity for layer in part.layers if layer.sensitivity is not None}
    both = [known[name] / ratio for name, ratio in outputs.items() if name in known and ratio > 0]
    if not both:
        return known or outputs
    unit = statistics.median(both)
    return {**{name: unit * ratio for name, ratio in outputs.items()}, **known}


def weigh(tensors: Sequence[Tensor], ratios: Ratios) -> list[str]:
    """Have the errors of the tensors count by what they do to the model's output.

    Returns:
        A warning where layers are not in the report: their weight's relative error counts as it is.

    Raises:
        PlanError: no layer is in the report: it is of another model.
    """
    unknown = []
    for tensor in tensors:
        layer = (tensor.survey.component, tensor.name.removesuffix(".weight"))
        if layer not in ratios:
            unknown.append(layer[1])
        signal = max((error.signal for error in tensor.errors if error is not None), default=0.0)
        tensor.factor = ratios.get(layer, 1.0) / signal if signal > 0 else 0.0
    if len(unknown) == len(tensors):
        raise PlanError([f"--sensitivity: the report has none of the layers of this model: {first(unknown)}"])
    if not unknown:
        return []
    return [f"--sensitivity has no figure of {plural(len(unknown), 'layer')}, whose weight counts: {first(unknown)}"]
