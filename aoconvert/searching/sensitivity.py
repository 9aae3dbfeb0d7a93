"""How much an error in a weight matters to the layer's outputs, from the report of an evaluation.

An evaluation measured, for one scheme, the error of each layer's weight and that of its outputs on real inputs. Their
ratio belongs to the layer far more than to the scheme: so the relative output error of another scheme is estimated as
the relative error of the weight that it makes, times that ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.checkpoint.evaluation import read_evaluation
from aoconvert.errors import PlanError, UsageError
from aoconvert.humanize import first, plural

if TYPE_CHECKING:
    from aoconvert.searching.goals import Tensor

Ratios = Mapping[tuple[str, str], float]
"""Component and layer → squared relative error of the outputs over that of the weight."""


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
    found = {
        (part.name, layer.name): 10 ** ((layer.weight_sqnr_db - layer.output_sqnr_db) / 10)
        for part in report.components
        for layer in part.layers
        if layer.weight_sqnr_db is not None and layer.output_sqnr_db is not None
    }
    if not found:
        raise UsageError(f"--sensitivity {path} has no error of a layer's outputs", hint="run eval without --no-layers")
    return found


def weigh(tensors: Sequence[Tensor], ratios: Ratios) -> list[str]:
    """Have the errors of the tensors count as relative errors of their layers' outputs.

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
