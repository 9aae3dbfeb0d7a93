"""compressed-tensors: ``weight`` in 8 bits or ``weight_packed``, with ``weight_scale`` and what else belongs to it.

The config's groups say which scheme a module has: by name, by ``re:`` pattern or by class. The package's own
compressors make the values; rows of a weight with their scales are a weight to them.
Source of names, shapes and packing: ``compressed_tensors.compressors`` (0.20).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.models.base import Codes, Load, Rows, SourceTensor
from aoconvert.originals.base import ACTIVATIONS, CACHE, NOT_USED, Sorted, made

if TYPE_CHECKING:
    import torch

_PACKED, _PLAIN, _SCALE, _SHAPE, _ZEROS = "weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point"
_GLOBAL = "weight_global_scale"
_LEAVES = (_SCALE, _SHAPE, _ZEROS, _GLOBAL)
_WORD = 32
"""Values that are packed together: into as many words of 32 bits as they have bits."""
_FORMATS = {
    **dict.fromkeys(("naive-quantized", "int-quantized", "float-quantized"), _PLAIN),
    **dict.fromkeys(("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"), _PACKED),
}
_ALSO = {
    **dict.fromkeys(("input_scale", "input_zero_point", "input_global_scale"), ACTIVATIONS),
    **dict.fromkeys(("output_scale", "output_zero_point"), NOT_USED),
    **dict.fromkeys(("k_scale", "v_scale", "q_scale"), CACHE),
}


@dataclass(frozen=True)
class Compressed:
    """A matrix as a module of compressed-tensors stores it.

    Attributes:
        format: the package's name for it.
        scheme: its ``QuantizationScheme``.
        stored: its tensors by their names in the module.
        shape: of the matrix.
        unit: rows that are made together.
    """

    format: str
    scheme: Any = field(repr=False)
    stored: dict[str, SourceTensor]
    shape: tuple[int, int]
    unit: int

    @property
    def parts(self) -> tuple[SourceTensor, ...]:
        """The matrix first."""
        return tuple(self.stored.values())

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """In the dtype that the package gives them."""
        import torch
        from compressed_tensors.compressors import BaseCompressor

        state = {leaf: self._rows(leaf, tensor, rows, load) for leaf, tensor in self.stored.items() if leaf != _SHAPE}
        if _SHAPE in self.stored:
            state[_SHAPE] = torch.tensor([rows[1] - rows[0], self.shape[1]])
        compressor = BaseCompressor.get_value_from_registry(self.format)
        weight: torch.Tensor = compressor.decompress(state, self.scheme)[_PLAIN]
        return weight

    def _rows(self, leaf: str, tensor: SourceTensor, rows: Rows, load: Load) -> torch.Tensor:
        """What belongs to these rows: of one value for all nothing is cut off."""
        import torch

        height = tensor.shape[0] if tensor.shape else 1
        if height == self.shape[0] and (height > 1 or leaf in (_PACKED, _PLAIN)):
            return load(tensor, rows)
        if leaf in (_SCALE, _ZEROS) and height > 1:  # blocks, or words
            each = self.unit if leaf == _SCALE or self.format != "pack-quantized" else _WORD / self._bits
            found = load(tensor, (int(rows[0] / each), min(height, -int(-rows[1] // each))))
            # the package does not unpack a single word; what is too much is cut off there
            return found if leaf == _SCALE or found.shape[0] > 1 else torch.cat([found, found])
        return load(tensor, None)

    @property
    def _bits(self) -> int:
        return int(self.scheme.weights.num_bits)


def sort(found: Sorted) -> str:
    """Take the quantized weights; say how they are stored.

    Raises:
        SourceError: a format that is not read; a weight without its scales, or with ones that do not fit.
    """
    config = _read_config(found)
    kinds: dict[str, None] = {}
    for name in [name for name in found.left if name.rpartition(".")[2] in (_PACKED, _PLAIN)]:
        module, _, leaf = name.rpartition(".")
        weight = found.left[name]
        if leaf == _PLAIN and (weight.dtype.itemsize != 1 or f"{module}.{_SCALE}" not in found.left):
            continue
        scheme, form = _scheme_of(found, config, module, leaf)
        formula = _formula(found, module, leaf, scheme, form)
        found.add(made(f"{module}.{_PLAIN}", _dtype(formula), formula.shape, formula, _codes(formula)))
        kinds[_describe(form, scheme.weights)] = None
    for leaf, why in _ALSO.items():
        found.drop(lambda name, leaf=leaf: name.rpartition(".")[2] == leaf, why)  # type: ignore[misc]
    found.refuse_narrow()
    return " and ".join(kinds)


def _read_config(found: Sorted) -> Any:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    sparsity = found.config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise _not_read(found, f"sparsity ({sparsity.get('format')})")
    values = {key: value for key, value in found.config.items() if key not in ("sparsity_config", "transform_config")}
    if found.config.get("transform_config"):
        raise _not_read(found, "transforms (transform_config)")
    try:
        return QuantizationConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SourceError(
            f"{found.title}: its quantization_config is not one of compressed-tensors: {where}: {first['msg']}",
            hint="download config.json again, or upgrade compressed-tensors",
        ) from error


def _not_read(found: Sorted, what: str) -> SourceError:
    return SourceError(
        f"{found.title}: it is quantized by compressed-tensors with {what}, which is not read",
        hint="start from the original, unquantized model",
    )


def _scheme_of(found: Sorted, config: Any, module: str, leaf: str) -> tuple[Any, str]:
    """The scheme of a module and its format: of the groups that name it, else of the one for a class of modules."""
    from compressed_tensors.utils.match import match_name

    schemes = [scheme for scheme in config.config_groups.values() if scheme.weights is not None]
    named = [scheme for scheme in schemes if any(match_name(module, target) for target in scheme.targets)]
    by_class = [
        scheme
        for scheme in schemes
        if any(not target.startswith("re:") and "." not in target for target in scheme.targets)
    ]
    fitting = (named or by_class)[:2]
    if len(fitting) > 1 and not named:
        fitting = [scheme for scheme in by_class if "Linear" in scheme.targets]
    if not fitting:
        raise found.damaged(f"{module}.{leaf} is quantized, but no group of its quantization_config is for it")
    scheme = fitting[0]
    form = scheme.format or config.format
    form = str(getattr(form, "value", form))
    if _FORMATS.get(form) != leaf:
        raise _not_read(found, f"the format {form} for {module}.{leaf}")
    return scheme, form


def _formula(found: Sorted, module: str, leaf: str, scheme: Any, form: str) -> Compressed:
    stored = {leaf: found.left[f"{module}.{leaf}"]}
    stored |= {name: found.left[f"{module}.{name}"] for name in _LEAVES if f"{module}.{name}" in found.left}
    weight, weights = stored[leaf], scheme.weights
    if f"{module}.weight_g_idx" in found.left:
        raise _not_read(found, f"columns in another order ({module}.weight_g_idx)")
    if len(weight.shape) != 2:
        raise found.damaged(f"{weight.name} has the shape {list(weight.shape)}, which no matrix has")
    needed = [_SCALE, *([_SHAPE] if form == "pack-quantized" else []), *([] if weights.symmetric else [_ZEROS])]
    if missing := [name for name in needed if name not in stored]:
        raise found.damaged(f"{weight.name} has no {module}.{missing[0]} beside it")
    shape = _shape(found, stored, weight, form, weights.num_bits)
    unit = weights.block_structure[0] if weights.strategy == "block" else 1
    _check_scale(found, stored[_SCALE], shape, weights)
    if form == "pack-quantized" and _ZEROS in stored:
        unit = _WORD // gcd(_WORD, weights.num_bits)
        words = -(-shape[0] * weights.num_bits // _WORD)
        found.check_shape(stored[_ZEROS], (words, stored[_SCALE].shape[-1]), weight.name)
    elif _ZEROS in stored:
        found.check_shape(stored[_ZEROS], stored[_SCALE].shape, weight.name)
    return Compressed(form, scheme, stored, shape, unit)


def _shape(found: Sorted, stored: dict[str, SourceTensor], weight: SourceTensor, form: str, bits: int) -> Rows:
    rows, columns = weight.shape
    if form != "pack-quantized":
        return rows, columns * (2 if weight.name.endswith(_PACKED) else 1)
    found.check_shape(stored[_SHAPE], (2,), weight.name)
    shape = tuple(int(size) for size in found.peek(stored[_SHAPE]))
    if shape[0] != rows or -(-shape[1] * bits // 32) != columns:
        raise found.damaged(f"{stored[_SHAPE].name} says {list(shape)}, which does not fit {weight.name}")
    return shape[0], shape[1]


def _check_scale(found: Sorted, scale: SourceTensor, shape: Rows, weights: Any) -> None:
    """Refuse a scale whose shape is not what the strategy has."""
    rows, columns = shape
    expected: tuple[tuple[int, ...], ...]
    if weights.strategy == "tensor":
        expected = ((1,), (), (1, 1))
    elif weights.strategy == "channel":
        expected = ((rows, 1),)
    elif weights.strategy in ("group", "tensor_group"):
        expected = ((rows, columns // weights.group_size),)
    elif weights.strategy == "block":
        height, width = weights.block_structure
        expected = ((-(-rows // height), -(-columns // width)),)
    else:
        raise _not_read(found, f"the strategy {getattr(weights.strategy, 'value', weights.strategy)}")
    if scale.shape not in expected:
        found.check_shape(scale, expected[0], "its weight")


def _codes(formula: Compressed) -> Codes | None:
    """What a class of torchao can hold: 8-bit codes that are not packed, without zero points, in rows or in blocks."""
    weights = formula.scheme.weights
    blocks = {
        "tensor": formula.shape,
        "channel": (1, formula.shape[1]),
        "block": tuple(weights.block_structure or ()),
    }
    block = blocks.get(str(getattr(weights.strategy, "value", weights.strategy)))
    if _PLAIN not in formula.stored or not weights.symmetric or block is None or _GLOBAL in formula.stored:
        return None
    return Codes(formula.stored[_PLAIN], formula.stored[_SCALE], (block[0], block[1]))


def _dtype(formula: Compressed) -> torch.dtype:
    import torch

    # 4-bit floating values are unpacked to bfloat16, whatever their scales are stored in
    return torch.bfloat16 if formula.format.endswith("fp4-pack-quantized") else formula.stored[_SCALE].dtype


def _describe(form: str, weights: Any) -> str:
    kind = f"{weights.type.value if hasattr(weights.type, 'value') else weights.type}{weights.num_bits}"
    strategy = str(getattr(weights.strategy, "value", weights.strategy))
    if strategy == "block":
        each = "block of {}×{}".format(*weights.block_structure)
    else:
        each = {"channel": "row", "tensor": "tensor"}.get(strategy, f"group of {weights.group_size}")
    return f"{form}: {kind} with a scale for each {each}"
