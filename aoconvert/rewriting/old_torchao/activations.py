"""How old torchao quantized activations at run time: functions, and settings beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aoconvert.formats.torch_bin.contents import BinTensor, Instance, Symbol, Value
from aoconvert.rewriting.migrate_types import CannotMigrate

_INT8 = {
    "_int8_symm_per_token_reduced_range_quant": "int8_symmetric",
    "_int8_symm_per_token_reduced_range_quant_noop_decode": "int8_symmetric",
    "_int8_symm_per_token_quant": "int8_symmetric",
    "_int8_asymm_per_token_quant": "int8_asymmetric",
    "_input_activation_quant_func_fp8": "float8",
    "_input_quant_func_dyanmic_fp8": "float8",
    "_int4_symm_cutlass_quant": "int4",
}


@dataclass(frozen=True)
class Activations:
    """What activations become.

    Attributes:
        kind: what they are quantized to.
        settings: beside the function.
        function: its name.
    """

    kind: Literal["none", "int8_symmetric", "int8_asymmetric", "float8", "int4"]
    settings: Mapping[str | int, Value]
    function: str = ""

    @property
    def is_per_row(self) -> bool:
        """Whether float8 activations have a scale per token."""
        found = self.settings.get("activation_granularity")
        return isinstance(found, Instance) and found.class_name.endswith(".PerRow")

    @property
    def is_static(self) -> bool:
        """Whether their scale was measured beforehand, and is stored."""
        return self.settings.get("activation_scale") is not None or self.settings.get("scale") is not None

    @property
    def dtype(self) -> str:
        """Of float8 activations, without ``torch.``."""
        found = self.settings.get("activation_dtype")
        return found.name.removeprefix("torch.") if isinstance(found, Symbol) else "float8_e4m3fn"


NO_ACTIVATIONS = Activations("none", {})


def unwrap(tensor: BinTensor) -> tuple[BinTensor, Activations]:
    """The weight within, and what was to be done with activations.

    Raises:
        CannotMigrate: a wrapper, or a function, that is not known.
    """
    name = last_name(tensor.class_name)
    if name == "WeightTensorWithLinearActivationScaleMetadata":
        raise CannotMigrate("it also scales activations (SmoothQuant or AWQ), for which torchao has no class today")
    if name == "WeightTensorWithLinearActivationQuantizationMetadata":
        # activations by a scale that was measured beforehand
        return _within(tensor), Activations("float8", {"activation_scale": True}, name)
    if name != "LinearActivationQuantizedTensor":
        return tensor, NO_ACTIVATIONS
    weight = _within(tensor)
    found = tensor.attributes.get("input_quant_func")
    settings = tensor.attributes.get("quant_kwargs")
    if isinstance(found, Instance) and found.class_name == "functools.partial":
        settings = found.state
        found = found.args[0] if found.args else None
    function = last_name(found.name) if isinstance(found, Symbol) else ""
    kind = _INT8.get(function)
    if kind is None:
        raise CannotMigrate(f"its activations were quantized by {function or 'a function'} that nothing replaces")
    values = settings if isinstance(settings, Mapping) else {}
    return weight, Activations(kind, values, function)  # type: ignore[arg-type]


def _within(tensor: BinTensor) -> BinTensor:
    """The weight in a wrapper, which has its shape and dtype."""
    weight = tensor.inner.get("original_weight_tensor")
    if weight is None or (weight.shape, weight.dtype) != (tensor.shape, tensor.dtype):
        raise CannotMigrate("it holds no weight of its shape and dtype")
    return weight


def last_name(dotted: str) -> str:
    """The last component of a dotted name: module paths moved in almost every release of torchao."""
    return dotted.rpartition(".")[2]
