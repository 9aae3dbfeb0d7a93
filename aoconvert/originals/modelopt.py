"""NVIDIA's Model Optimizer: ``quant_algo`` ``FP8`` and ``FP8_PER_CHANNEL_PER_TOKEN``.

``M.weight`` is ``float8_e4m3fn``, ``M.weight_scale`` float32: one value for the matrix, or one for each row. A value
is the code times its scale, in float32. ``M.input_scale`` belongs to static activations, ``k_scale`` and ``v_scale``
to the key-value cache. The config names the algorithm in ``quantization_config``; older exports only in
``hf_quant_config.json``.
Source of names, shapes and formula: ``to_quantized_weight`` and ``postprocess_state_dict`` in
``modelopt/torch/export/quant_utils.py``, and ``FP8QTensor.dequantize`` in
``modelopt/torch/quantization/qtensor/fp8_tensor.py`` (nvidia-modelopt 0.47), with float32 as its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from aoconvert.errors import SourceError
from aoconvert.models.base import Codes, Load, Rows, SourceTensor
from aoconvert.originals.base import ACTIVATIONS, CACHE, Sorted, made

if TYPE_CHECKING:
    import torch

_WEIGHT, _SCALE = ".weight", ".weight_scale"
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".k_proj.output_scale", ".v_proj.output_scale")
# they change what a layer computes, so that the weight alone does not stand for it
_OTHER = (".pre_quant_scale", ".weight_scale_2", ".svdquant_lora_a", ".svdquant_lora_b", ".k_bias", ".v_bias")


@dataclass(frozen=True)
class Scaled:
    """A matrix of float8, with one scale for all of it or one for each row."""

    weight: SourceTensor
    scale: SourceTensor
    unit: int = 1

    @property
    def parts(self) -> tuple[SourceTensor, ...]:
        """The matrix first."""
        return self.weight, self.scale

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """In float32."""
        import torch

        scale = load(self.scale, None).to(torch.float32).reshape(-1, 1)
        return load(self.weight, rows).to(torch.float32) * (scale if len(scale) == 1 else scale[rows[0] : rows[1]])


def sort(found: Sorted) -> str:
    """Take the quantized weights; say how they are stored.

    Raises:
        SourceError: a weight without its scale, or with one that does not fit; another algorithm's tensors.
    """
    import torch

    if other := next((name for name in found.left if name.endswith(_OTHER)), None):
        raise SourceError(
            f"{found.title}: {other} belongs to another algorithm of ModelOpt than {found.config.get('quant_algo')}",
            hint="start from the original, unquantized model",
        )
    kinds: dict[str, None] = {}
    for name in [name for name in found.left if name.endswith(_SCALE)]:
        scale, weight = found.left[name], found.left.get(name.removesuffix(_SCALE) + _WEIGHT)
        if weight is None or weight.dtype != torch.float8_e4m3fn or len(weight.shape) != 2:
            what = "not there" if weight is None else f"{str(weight.dtype)[6:]} {list(weight.shape)}"
            raise found.damaged(f"{name} needs a matrix of float8_e4m3fn, but its weight is {what}")
        rows, columns = weight.shape
        per_tensor = prod(scale.shape) == 1
        if not per_tensor and scale.shape != (rows, 1):
            found.check_shape(scale, (rows,), weight.name)
        block = (rows, columns) if per_tensor else (1, columns)
        formula = Scaled(weight, scale)
        found.add(made(weight.name, torch.float32, weight.shape, formula, Codes(weight, scale, block)))
        kinds[f"float8 with a scale for each {'tensor' if per_tensor else 'row'}"] = None
    found.drop(lambda name: name.endswith(".input_scale"), ACTIVATIONS)
    found.drop(lambda name: name.endswith(_CACHE), CACHE)
    found.refuse_narrow()
    return f"{found.config.get('quant_algo')}: {' and '.join(kinds)}"
