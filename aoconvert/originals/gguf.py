"""GGUF: blocks of values in one file, in the names of llama.cpp, or of a denoiser's authors.

Source: ``gguf.quants``, whose own ``dequantize`` makes the values, row by row; ``transformers.
modeling_gguf_pytorch_utils``, whose own mapping gives the names of a language model, and whose own processors give its
tensors their order. Of a denoiser the tensors keep their names: ``models.single_file`` has diffusers' conversion.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aoconvert.environment import version_of
from aoconvert.errors import SourceError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.models.base import Load, ModelPart, Rows, SourceTensor
from aoconvert.models.bounds import Held, limit_model
from aoconvert.originals.base import Sorted, made

if TYPE_CHECKING:
    import numpy as np
    import torch

_NOT_TAKEN = "transformers does not use it when it opens this file"
_HEADS = re.compile(r".*\.attn_[qk]\..*")
_HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads")


def _values(stored: SourceTensor, rows: Rows | None, load: Load) -> torch.Tensor:
    """Rows of a stored tensor, in float32, as ``gguf`` makes them."""
    import torch
    from gguf import GGMLQuantizationType, dequantize

    data = load(stored, rows)
    if stored.packing is None:
        return data.to(torch.float32)
    return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[stored.packing]))


@dataclass(frozen=True)
class Blocks:
    """A tensor whose rows are stored one after the other."""

    stored: SourceTensor
    unit: int = 1

    @property
    def parts(self) -> tuple[SourceTensor, ...]:
        """The blocks."""
        return (self.stored,)

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """In float32."""
        return _values(self.stored, rows, load)


@dataclass(frozen=True, eq=False)
class Processed:
    """A tensor that transformers' processor makes of the values of one or several.

    Attributes:
        parts: what is stored.
        target: its state-dict key.
        names: transformers' mapping from names in the file.
        architecture: whose processor it is.
        config: for the processor.
        unit: rows that it takes together.
        by_heads: a unit is an attention head.
        whole: it takes all rows together.
    """

    parts: tuple[SourceTensor, ...]
    target: str
    names: Mapping[str, str] = field(repr=False)
    architecture: str
    config: Mapping[str, Any] = field(repr=False)
    unit: int
    by_heads: bool = False
    whole: bool = False

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """In float32."""
        import torch

        config = dict(self.config)
        if self.by_heads:
            config |= dict.fromkeys(_HEAD_COUNTS, (rows[1] - rows[0]) // self.unit)
        processor = _processor(self.architecture, config)
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for part in self.parts:
            values = _values(part, None if self.whole else rows, load).numpy()
            result = processor.process(
                weights=values, name=part.name, tensor_key_mapping=self.names, parsed_parameters=parsed
            )
        if (found := parsed["tensors"].get(self.target)) is not None:
            return found
        return torch.from_numpy(result.weights.copy())


def _processor(architecture: str, config: Mapping[str, Any]) -> Any:
    """As ``load_gguf_checkpoint`` chooses it."""
    from transformers import modeling_gguf_pytorch_utils as library

    return library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)(config=dict(config))


def sort(found: Sorted) -> str:
    """Take every tensor; say how they are stored.

    Raises:
        SourceError: it is not a GGUF file; a type that gguf does not dequantize; parts that do not fit together.
    """
    stored = list(found.left.values())
    if not all(tensor.file.lower().endswith(".gguf") for tensor in stored):
        raise found.damaged("its config says that it is in a GGUF file, and it is not")
    _refuse_types(found, stored)
    if found.component.library == "diffusers":
        for tensor in stored:
            if tensor.packing is not None:
                found.add(_rows(tensor, tensor.name))
    else:
        _Namer(found).take_all()
    return describe_types(stored)


def describe_types(stored: Iterable[SourceTensor]) -> str:
    """The types, that of most bytes first, and how many tensors have each."""
    import torch

    plain = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in stored:
        name = tensor.packing or plain.get(tensor.dtype, dtype_name(tensor.dtype))
        counts[name] += 1
        sizes[name] += tensor.nbytes
    return ", ".join(f"{name} ×{counts[name]}" for name, _ in sizes.most_common())


def model_dtype(stored: Sequence[SourceTensor]) -> str:
    """What a model runs in whose file does not say it: the type that its values have, where they are not in blocks.

    Source: ``dtype`` of ``transformers.integrations.gguf.reader.GgufHeader``.
    """
    import torch

    if any(tensor.packing is not None for tensor in stored):
        return "bfloat16"
    types = {tensor.dtype for tensor in stored}
    return next((dtype_name(dtype) for dtype in (torch.bfloat16, torch.float16) if dtype in types), "float32")


def _refuse_types(found: Sorted, stored: Iterable[SourceTensor]) -> None:
    """Refuse what gguf does not dequantize.

    Raises:
        SourceError: it is there.
    """
    import numpy as np
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    wanted: dict[str, str] = {}
    for tensor in stored:
        if tensor.packing is not None:
            wanted.setdefault(tensor.packing, tensor.name)
        elif tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise _not_read(found, tensor.name, dtype_name(tensor.dtype))
    for packing, name in wanted.items():
        kind = GGMLQuantizationType[packing]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            raise _not_read(found, name, packing) from None


def _not_read(found: Sorted, name: str, kind: str) -> SourceError:
    return SourceError(
        f"{found.title}: {name} is of the type {kind}, which gguf {version_of('gguf')} does not dequantize",
        hint="use a file of other types, or start from the original that is not quantized",
    )


def _shape(stored: SourceTensor) -> tuple[int, ...]:
    """Of the values."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_from_byte_shape

    if stored.packing is None:
        return stored.shape
    return tuple(quant_shape_from_byte_shape(stored.shape, GGMLQuantizationType[stored.packing]))


def _rows(stored: SourceTensor, name: str) -> SourceTensor:
    import torch

    return made(name, torch.float32, _shape(stored), Blocks(stored))


class _Namer:
    """Finds what transformers makes of the tensors of a language model's file.

    Args:
        found: the tensors.

    Raises:
        SourceError: it knows no names for such a model.
    """

    def __init__(self, found: Sorted) -> None:
        self._found = found
        self._architecture = str(found.config.get("architecture"))
        self._config: Mapping[str, Any] = found.config.get("values") or {}
        self._processor = _processor(self._architecture, self._config)
        self._names = _names(found.component, self._processor, Held.of(t.nbytes for t in found.left.values()))
        self._stacks: dict[str, list[SourceTensor]] = {}

    def take_all(self) -> None:
        """Sort every stored tensor."""
        for tensor in list(self._found.left.values()):
            self._take(tensor)
        for target, parts in self._stacks.items():
            self._add_stack(target, parts)

    def _take(self, stored: SourceTensor) -> None:
        import numpy as np

        if (stack := self._stack_of(stored.name)) is not None:
            self._stacks.setdefault(stack, []).append(stored)
        elif _HEADS.fullmatch(stored.name) and (heads := self._heads(stored.name)) is not None:
            self._add_heads(stored, heads)
        elif self._architecture == "gpt2" and stored.name == "output.weight":
            self._found.add(_rows(stored, "lm_head.weight"))  # its processor copies it as it is
        else:
            probe = np.broadcast_to(np.float32(-1), _shape(stored))
            result = self._processor.process(
                weights=probe, name=stored.name, tensor_key_mapping=self._names, parsed_parameters={"tensors": {}}
            )
            self._add(stored, result.name, result.weights, changed=result.weights is not probe)

    def _add(self, stored: SourceTensor, name: str | None, like: np.ndarray[Any, Any], *, changed: bool) -> None:
        """``like`` has the shape of what the processor makes."""
        target = self._names.get(name) if name is not None else None
        if target is None:
            self._found.drop_as({stored.name}, _NOT_TAKEN)
        elif not changed:
            self._found.add(_rows(stored, target))
        else:
            self._make(target, tuple(like.shape), (stored,), like.shape[0], whole=True)

    def _make(self, target: str, shape: tuple[int, ...], parts: Sequence[SourceTensor], unit: int, **how: bool) -> None:
        import torch

        formula = Processed(tuple(parts), target, self._names, self._architecture, self._config, unit, **how)
        self._found.add(made(target, torch.float32, shape, formula))

    def _heads(self, name: str) -> int | None:
        """Heads whose rows transformers puts in its own order; ``None`` where it leaves them."""
        from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

        if not isinstance(self._processor, LlamaTensorProcessor):
            return None
        queries, keys = (self._config.get(key) for key in _HEAD_COUNTS)
        return None if queries is None or keys is None else int(queries if ".attn_q." in name else keys)

    def _add_heads(self, stored: SourceTensor, heads: int) -> None:
        shape, target = _shape(stored), self._names.get(stored.name)
        if target is None:
            self._found.drop_as({stored.name}, _NOT_TAKEN)
        elif heads < 1 or shape[0] % (2 * heads):
            raise self._found.damaged(f"{stored.name} has {shape[0]} rows, which are not those of {heads} heads")
        else:
            self._make(target, shape, (stored,), shape[0] // heads, by_heads=True)

    def _stack_of(self, name: str) -> str | None:
        """The experts' parameter that a tensor goes into."""
        from transformers import modeling_gguf_pytorch_utils as library

        kinds = [getattr(library, f"{kind}TensorProcessor", None) for kind in ("Qwen2Moe", "MiniMaxM2")]
        if type(self._processor) not in kinds:
            return None
        match = re.fullmatch(self._processor.GGUF_MOE_WEIGHTS_PATTERN, name)
        return self._names.get(match["name"]) if match else None

    def _add_stack(self, target: str, parts: Sequence[SourceTensor]) -> None:
        """Of the experts: gate and up are put together, each expert is a row."""
        shapes = [_shape(part) for part in parts]
        together = {part.name.split("_")[1] for part in parts}
        if together not in ({"down"}, {"gate", "up"}) or len(set(shapes)) > 1 or len(shapes[0]) != 3:
            raise self._found.damaged(f"{' and '.join(part.name for part in parts)} do not make {target}")
        experts, rows, columns = shapes[0]
        self._make(target, (experts, rows * len(parts), columns), parts, 1)


def _names(component: ModelPart, processor: Any, held: Held) -> Mapping[str, str]:
    """The names in the file → state-dict keys.

    Raises:
        SourceError: gguf knows no names for such a model.
    """
    import torch
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    from aoconvert.environment import quiet_imports
    from aoconvert.models.transformers import empty_model

    with limit_model(component.title, held), quiet_imports():
        model = empty_model(component, torch.bfloat16)
    try:
        names: Mapping[str, str] = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise SourceError(
            f"{component.title}: gguf {version_of('gguf')} has no names for the tensors of such a model",
            hint="pip install -U gguf",
        ) from error
    return names
