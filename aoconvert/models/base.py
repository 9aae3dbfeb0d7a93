"""What a model is made of, read from its config alone: components, and every tensor of each component's state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from aoconvert.errors import SourceError
from aoconvert.formats.dtypes import dtype_name

if TYPE_CHECKING:
    import torch
    from torch import nn

Library = Literal["diffusers", "transformers"]
Kind = Literal["linear", "embedding", "experts", "other"]

Rows = tuple[int, int]
"""Start and stop along dimension 0."""

Load = Callable[["SourceTensor", "Rows | None"], "torch.Tensor"]
"""Gives a tensor of the checkpoint, or rows of it."""


@dataclass(frozen=True)
class ModelPart:
    """One model of a checkpoint: the whole of it, or one part of a diffusers pipeline.

    Attributes:
        name: ``"transformer"`` in a pipeline, ``""`` where the checkpoint is a single model.
        folder: where its config and weights are in the source, relative, ``""`` for the root.
        library: the library whose class it is, or whose base class it has.
        class_name: the model class, e.g. ``"CogVideoXTransformer3DModel"``.
        config: its ``config.json``.
        module: what model_index.json names in the library's place, where the class is a pipeline's own
            (``"stable_diffusion"``) or code inside the checkpoint; ``library`` is that of its base class then.
    """

    name: str
    folder: str
    library: Library
    class_name: str
    config: Mapping[str, Any] = field(repr=False)
    module: str | None = None

    @property
    def title(self) -> str:
        """How messages call it."""
        return self.name or self.class_name


class Formula(Protocol):
    """How a tensor is made of those that the checkpoint stores for it."""

    @property
    def parts(self) -> tuple[SourceTensor, ...]:
        """What is stored for it, as it is stored."""

    @property
    def unit(self) -> int:
        """Rows that are made together: those that share a scale, or a word in which they are packed."""

    def make(self, rows: Rows, load: Load) -> torch.Tensor:
        """Rows of the tensor, in its dtype.

        Args:
            rows: from a multiple of ``unit`` to another, or to the end.
            load: gives the parts.
        """


@dataclass(frozen=True)
class Codes:
    """8-bit codes that a class of torchao can hold as they are stored: a value is a code times its scale.

    Attributes:
        data: the codes, of the matrix's shape.
        scale: a scale for each block, in rows of blocks.
        block: rows and columns that share a scale.
    """

    data: SourceTensor
    scale: SourceTensor
    block: Rows


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint: the file that holds it (relative to the source), its name there, what it is.

    ``place`` is the byte of the file at which its elements begin, and its strides: tensors of one file with the same
    place, shape and dtype are one tensor under several names. ``None`` where no two can be.

    With a ``formula`` the file does not hold it as it is: it is made of stored ones. Then ``name`` is the one it would
    have if it were stored, ``file`` that of its first part, ``nbytes`` the bytes of all its parts, and ``codes`` what
    of these a class of torchao can take over. ``packing`` is the format's name for blocks of values that are stored as
    bytes.
    """

    file: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    place: tuple[int, ...] | None = None
    formula: Formula | None = field(default=None, repr=False)
    packing: str | None = None
    codes: Codes | None = field(default=None, repr=False)

    @property
    def dequantized(self) -> bool:
        """Whether its formula makes it of quantized values; of a GGUF file it may only arrange plain ones anew."""
        parts = self.formula.parts if self.formula is not None else ()
        return any(p.packing or p.dtype.itemsize == 1 or not p.dtype.is_floating_point for p in parts)

    @property
    def read_bytes(self) -> int:
        """Bytes of it in memory."""
        return self.nbytes if self.formula is None else math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSpec:
    """One entry of a model's state dict, as its class defines it.

    Attributes:
        name: state-dict key.
        shape: its shape.
        floating: whether its dtype is a floating one (the others are never cast).
        dtype: dtype in a freshly built model; what it is stored as where ``floating`` is false.
        module: name of the owning module.
        module_class: class name of the owning module, e.g. ``"Linear"``.
        parameter: a parameter, not a buffer.
        kind: ``linear`` for the weight torchao's ``quantize_`` takes, ``embedding`` for an embedding table, ``experts``
            for a mixture's stack of matrices in one 3-D parameter; whether a scheme can run there is for
            ``experts.settle`` to say.
        tied_to: name of the tensor that this one shares its memory with, or ``None``.
        compared_with: a tensor of its own, which config or class declare to be this one: the library compares them with
            each other while it opens the model; ``None`` where there is none.
        keep_fp32: the class asks for float32 whatever the model's dtype.
        single_row: its layer sees one row per sample (modulation, timestep, pooled projection), or may see no more: an
            expert sees the tokens that are routed to it.
        convolution: weight of a convolution, of whatever class.
        hint: why a careful converter leaves it alone by default, in words; a matter of quality, not of what can be
            loaded and run, which the fields above say.
    """

    name: str
    shape: tuple[int, ...]
    floating: bool
    dtype: torch.dtype
    module: str
    module_class: str
    kind: Kind
    parameter: bool = True
    tied_to: str | None = None
    compared_with: str | None = None
    keep_fp32: bool = False
    single_row: bool = False
    convolution: bool = False
    hint: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Skeleton:
    """A component's empty model and what it is made of.

    ``model`` is on ``meta`` as a whole; ``None`` where what it is made of was known without building it. ``fused``
    names the layers that ``models.fused`` put in the place of others. ``code_root`` is the folder with the checkpoint's
    own code, where that may be run.
    """

    component: ModelPart
    model: nn.Module | None = field(repr=False)
    tensors: tuple[TensorSpec, ...] = field(repr=False)
    fused: frozenset[str] = field(default=frozenset(), repr=False)
    code_root: Path | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)


def to_json(tensors: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """The tensors as JSON values."""
    return [{**asdict(spec), "dtype": dtype_name(spec.dtype)} for spec in tensors]


def from_json(values: Any) -> tuple[TensorSpec, ...]:
    """What :func:`to_json` gave.

    Raises:
        TypeError, KeyError, AttributeError, ValueError: it is something else.
    """
    import torch

    specs = []
    for value in values:
        dtype = getattr(torch, value["dtype"])
        spec = TensorSpec(**{**value, "dtype": dtype, "shape": tuple(map(int, value["shape"]))})
        if not isinstance(dtype, torch.dtype) or not isinstance(spec.name, str):
            raise ValueError("no tensor")
        specs.append(spec)
    return tuple(specs)


def build_empty(component: ModelPart, build: Callable[[], nn.Module], *, buffers: bool = False) -> nn.Module:
    """Run ``build`` so that the model has everything on ``meta``.

    Buffers too: the position tables of a video model are larger than its largest weight. A class whose ``__init__``
    looks at values cannot be built so; it is built with real buffers, which are dropped then.

    Args:
        component: the model.
        build: makes it.
        buffers: with real buffers.

    Raises:
        SourceError: the class does not take its config.
    """
    from accelerate import init_empty_weights

    try:
        try:
            with init_empty_weights(include_buffers=not buffers):
                model = build()
        except (RuntimeError, NotImplementedError):
            with init_empty_weights(include_buffers=False):
                model = build()
    except SourceError:
        raise
    except Exception as error:  # any class may fail in its own way on a bad config
        raise SourceError(
            f"{component.title}: {component.class_name} does not accept its config.json: {error}".splitlines()[0],
            hint=f"check the config against the class, or upgrade {component.library}",
        ) from error
    for module in () if buffers else model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
    return model


# Layers that see one row per sample. torchao's int8 dynamic path ends in torch._int_mm, which wants more rows
# (unslothai/unsloth#6716). Found by class and by name; tests/models/ checks the rules against real forward passes.
_SINGLE_ROW_CLASSES = re.compile(
    r"Ada\w*Norm\w*|\w*(?:Layer|RMS)Norm(?:Zero|Continuous)\w*|\w*Modulation\w*"
    r"|TimestepEmbedding|CombinedTimestep(?:Text|Guidance|Label|Size)\w*|PixArtAlphaCombinedTimestep\w*"
    r"|\w*Pooler|\w*ClassificationHead"
)
_SINGLE_ROW_NAMES = re.compile(r"(?:.*\.)?(?:time_emb_proj|time_proj|\w*_mod\.\d+|adaLN_modulation\.\d+)")


def single_row_modules(model: nn.Module) -> frozenset[str]:
    """Names of the linear layers of ``model`` that see one row per sample in a forward pass.

    A rule by class name (of the layer or anything around it) and by module name. ``TimestepEmbedding`` inside a
    text embedder does not occur; a projection of a token sequence is never matched.
    """
    from torch import nn

    inside = {name for name, module in model.named_modules() if _SINGLE_ROW_CLASSES.fullmatch(type(module).__name__)}
    found = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parents = {name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)}
        if parents & inside or _SINGLE_ROW_NAMES.fullmatch(name):
            found.add(name)
    return frozenset(found)


def _count_of_experts(module: nn.Module | None) -> int | None:
    """How many experts a module holds, in stacks or as modules of their own."""
    from torch import nn
    from torch.nn.utils.parametrize import ParametrizationList

    count = getattr(module, "num_experts", None)
    if isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList):
        return len(module)
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def router_modules(model: nn.Module) -> Mapping[str, str]:
    """Linear layers that choose or weigh experts: module name → what it is.

    They are small, and a wrong choice of expert costs far more than their bytes: compressed-tensors (vllm-project,
    #733), MLC (mlc-llm#2012) and NVIDIA's Model Optimizer (#1858) leave them alone. Found by structure: beside
    ``experts`` (a stack or a list of modules), a linear layer with one output for each of them, or with a single one.
    """
    from torch import nn

    found: dict[str, str] = {}
    for name, module in model.named_modules():
        count = _count_of_experts(getattr(module, "experts", None))
        if count is None or not isinstance(module.experts, nn.Module):
            continue
        for child, layer in module.named_modules():
            if not isinstance(layer, nn.Linear) or any("expert" in part for part in child.split(".")[:-1]):
                continue
            if layer.out_features == count:
                found[f"{name}.{child}".lstrip(".")] = "router of a mixture of experts"
            elif layer.out_features == 1:
                found[f"{name}.{child}".lstrip(".")] = "gate of a mixture's shared expert"
    return found


def describe_tensors(
    model: nn.Module,
    *,
    tied: Mapping[str, str],
    keep_fp32: frozenset[str],
    precise: frozenset[str],
    output_heads: frozenset[str] = frozenset(),
    vocabulary: int | None = None,
) -> tuple[TensorSpec, ...]:
    """Every tensor of ``model.state_dict()``, in its order.

    Args:
        model: a model with its parameters on ``meta``.
        tied: state-dict key → the key it shares its memory with.
        keep_fp32: keys that stay in float32.
        precise: keys that the class lists as in need of float32, whether or not they get it.
        output_heads: names of the modules that give the model's output.
        vocabulary: how many rows the input embeddings have, 0 where there are none; ``None``: nobody knows.
    """
    from torch import nn

    modules = dict(model.named_modules())
    single_row = single_row_modules(model)
    routers = router_modules(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    specs = []
    for name, tensor in model.state_dict().items():
        owner = name.rpartition(".")[0]
        module = modules.get(owner, model)
        kind = _kind(name, tensor, module) if name in parameters else "other"
        hint = None
        if owner in output_heads and kind != "other":
            hint = "output head"
        elif kind == "embedding" and vocabulary is not None and tensor.shape[0] != vocabulary:
            hint = "not the input embeddings"  # positions, token types, a table of relative positions
        elif kind != "other":
            hint = routers.get(owner) or (_PRECISE if name in precise else None)
        specs.append(
            TensorSpec(
                name=name,
                shape=tuple(tensor.shape),
                floating=tensor.dtype.is_floating_point,
                dtype=tensor.dtype,
                module=owner,
                module_class=type(module).__name__,
                kind=kind,
                parameter=name in parameters,
                tied_to=tied.get(name),
                keep_fp32=name in keep_fp32,
                single_row=kind == "experts" or owner in single_row,
                convolution=isinstance(module, nn.modules.conv._ConvNd) and tensor.dim() > 1,
                hint=hint,
            )
        )
    return tuple(specs)


_PRECISE = "its class lists it in _keep_in_fp32_modules"


def _kind(name: str, tensor: torch.Tensor, module: nn.Module) -> Kind:
    from torch import nn

    if name.endswith("weight") and tensor.dim() == 2:
        # torchao's own filter: NonDynamicallyQuantizableLinear is nn.MultiheadAttention's output projection
        if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "linear"
        if isinstance(module, nn.Embedding):
            return "embedding"
    if tensor.dim() == 3 and tensor.dtype.is_floating_point and _count_of_experts(module) == tensor.shape[0]:
        return "experts"
    return "other"
