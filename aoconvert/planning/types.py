"""The plan: frozen values that say everything that will happen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from aoconvert.schemes.base import Layout
from aoconvert.schemes.layouts import UNPACKED, merge
from aoconvert.schemes.tensor_classes import oldest_reader

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

    from aoconvert.formats.registry import FileFormat
    from aoconvert.models import ModelLayout, ModelPart, Skeleton
    from aoconvert.models.base import SourceTensor
    from aoconvert.models.conversions import MergeRecipe
    from aoconvert.models.lora import Delta
    from aoconvert.models.lora_files import LoraFile
    from aoconvert.models.recording import ReplayRecipe
    from aoconvert.originals import Original
    from aoconvert.recipes.rules import Rules
    from aoconvert.schemes import Scheme
    from aoconvert.sources import Source
    from aoconvert.sources.weights import WeightFiles

Action = Literal["quantize", "cast", "keep", "tied", "carry"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one state-dict entry.

    Attributes:
        name: state-dict key.
        shape: its shape.
        dtype: dtype it will have; for a quantized one the dtype it dequantizes to.
        source_dtype: dtype in the checkpoint; ``dtype`` where it is dequantized.
        action: ``quantize``, ``cast`` (to ``dtype``), ``keep`` (same bytes), ``tied`` (not written) or ``carry``
            (unknown to the model class: under the checkpoint's name, same bytes).
        scheme: what it is quantized to; ``None`` where it is not.
        reason: why it is not quantized; ``None`` where it is. With ``--carry`` also why a quantized one keeps the codes
            of the original, or does not.
        candidate: a matrix that somebody could expect to be quantized (embeddings not counted).
        parameter: a parameter, not a buffer.
        embedding: an embedding table.
        bytes_in: bytes in the checkpoint; of all the stored tensors that it is made of.
        bytes_out: bytes of the tensor's data in the output, all inner tensors together.
        file: file of the output that holds it, relative; ``None`` where it is tied.
        origin: (file, name) in the source; ``None`` where it is made from others, or there are no weights.
        sources: (file, name) of what it is made from, in that order.
        working_bytes: host memory that is taken while it is made, beside itself.
        same_as: name of the tensor of the same file whose data it has: written once, under both names.
        carried: its codes and scales are those of a quantized original; nothing is quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source_dtype: str
    action: Action
    reason: str | None
    candidate: bool
    parameter: bool
    embedding: bool
    bytes_in: int
    bytes_out: int
    file: str | None = None
    origin: tuple[str, str] | None = None
    sources: tuple[tuple[str, str], ...] = ()
    working_bytes: int = 0
    scheme: Scheme | None = None
    same_as: str | None = None
    carried: bool = False

    @property
    def bytes_read(self) -> int:
        """Bytes in memory when it is read: more than in the checkpoint where that is quantized."""
        import torch

        dtype: torch.dtype = getattr(torch, self.source_dtype)
        return self.numel * dtype.itemsize if self.bytes_in else 0

    @property
    def is_written(self) -> bool:
        """Whether the output holds data of its own for it."""
        return self.file is not None and self.same_as is None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LeftOut:
    """A tensor that is not written, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FilePlan:
    """A weights file of the output, its size in bytes, exact for the versions installed here, and its head.

    ``head``: as of ``formats.base.FileOutline``.
    """

    path: str
    size: int
    head: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class CopyPlan:
    """A file that is taken over: ``source`` and ``path`` are relative to source and output.

    ``drop`` is the weights variant that its name has lost; an index of shards loses it inside, too.
    """

    source: str
    path: str
    size: int
    drop: str | None = None


@dataclass(frozen=True)
class Totals:
    """Sums over a component; ``quantized_fraction`` is of the parameters outside embeddings."""

    tensors: int
    parameters: int
    quantized_parameters: int
    quantized_fraction: float
    bytes_in: int
    bytes_out: int
    bits_per_weight: float


@dataclass(frozen=True)
class ComponentPlan:
    """Everything about one model that will be quantized.

    Attributes:
        rules: which scheme is for which tensor.
        config: torchao's config that says the same: a plain one, or an ``FqnToConfig``.
        folder: its folder in the output, ``""`` for the root.
        dtype: of what is not quantized and the base of what is; ``auto``: the source's.
        cannot_run: dtype that the class cannot run in, though it was wanted, and the error that it raises.
        tensors: in state-dict order.
        order: their names in the order they are read and written, file by file.
        skip_modules: linear modules that stay as they are, for ``modules_to_not_convert``.
        missing: tensors of the model that the checkpoint does not hold, and that the library makes.
        dropped: what the checkpoint holds and the result does not.
        apart: pairs of tensors that are one by config or class, but differ in the checkpoint: both are kept.
        recipes: state-dict key → how it is made from several tensors of the checkpoint, or by an operation on one.
        copied: why such tensors cannot be made one by one: transformers' loader makes a copy of all of them on the
            output's disk (they have neither ``origin`` nor ``sources``). ``None`` where it need not.
        format: of its weights files.
        original: how the source was quantized; ``None`` where it was not.
        made: the checkpoint's name → how a quantized tensor is made of stored ones.
        deltas: tensor → what LoRAs add to it, in that order.
    """

    component: ModelPart
    rules: Rules
    config: AOBaseConfig
    folder: str
    format: FileFormat
    dtype: str
    tensors: tuple[TensorPlan, ...]
    order: tuple[str, ...]
    files: tuple[FilePlan, ...]
    skip_modules: tuple[str, ...]
    missing: tuple[LeftOut, ...]
    dropped: tuple[LeftOut, ...]
    apart: tuple[tuple[str, str], ...]
    copied: str | None
    weights: WeightFiles | None
    skeleton: Skeleton = field(repr=False, compare=False)
    recipes: Mapping[str, MergeRecipe | ReplayRecipe] = field(default_factory=dict, repr=False, compare=False)
    cannot_run: tuple[str, str] | None = None
    original: Original | None = None
    made: Mapping[str, SourceTensor] = field(default_factory=dict, repr=False, compare=False)
    deltas: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme in use, the one of most parameters first."""
        counts: dict[str, int] = {}
        found: dict[str, Scheme] = {}
        for tensor in self.tensors:
            if tensor.scheme is not None:
                counts[tensor.scheme.key] = counts.get(tensor.scheme.key, 0) + tensor.numel
                found[tensor.scheme.key] = tensor.scheme
        return tuple(found[key] for key in sorted(found, key=lambda key: -counts[key]))

    @property
    def scheme_name(self) -> str:
        """The scheme's name; of several schemes all, with ``+`` between."""
        return "+".join(dict.fromkeys(scheme.name for scheme in self.schemes))

    @property
    def min_torchao(self) -> str:
        """Oldest torchao that loads every scheme in use, in files of this format, and computes the right thing."""
        found = [scheme.min_torchao for scheme in self.schemes]
        classes = [scheme.entry.tensor_class.name for scheme in self.schemes]
        return max([*found, oldest_reader(self.format.name, classes, self.component.library)], key=Version)

    @property
    def layout(self) -> Layout:
        """What the stored weights of all schemes together are made for."""
        return merge([scheme.layout for scheme in self.schemes]) if self.schemes else UNPACKED

    @property
    def unconfirmed(self) -> str | None:
        """Why nobody can be sure yet of the packed bytes of one of the schemes."""
        return next((scheme.entry.unconfirmed for scheme in self.schemes if scheme.entry.unconfirmed), None)

    @property
    def totals(self) -> Totals:
        """Sums over the tensors."""
        written = [tensor for tensor in self.tensors if tensor.action != "tied"]
        parameters = sum(t.numel for t in written if t.parameter)
        outside = sum(t.numel for t in written if t.parameter and not t.embedding and t.action != "carry")
        quantized = sum(t.numel for t in written if t.action == "quantize")
        quantized_outside = sum(t.numel for t in written if t.action == "quantize" and not t.embedding)
        bytes_out = sum(t.bytes_out for t in written)
        return Totals(
            tensors=len(self.tensors),
            parameters=parameters,
            quantized_parameters=quantized,
            quantized_fraction=quantized_outside / outside if outside else 0.0,
            bytes_in=sum(t.bytes_in for t in written),
            bytes_out=bytes_out,
            bits_per_weight=8 * bytes_out / parameters if parameters else 0.0,
        )

    @property
    def carried(self) -> tuple[TensorPlan, ...]:
        """Tensors of the checkpoint that the model class does not know."""
        return tuple(t for t in self.tensors if t.action == "carry")

    @property
    def skipped(self) -> tuple[TensorPlan, ...]:
        """Matrices that are not quantized, with their reasons."""
        return tuple(t for t in self.tensors if t.candidate and t.action in ("cast", "keep"))


@dataclass(frozen=True)
class UnquantizedPlan:
    """A part of a pipeline whose tensors are written as they are, into files of the output's format.

    Attributes:
        component: the part.
        folder: its folder in the output.
        tensors: in the order of the source's files; none where these are not here yet.
        order: names of those that are written, in the order they are read and written, file by file.
        files: with the source's sizes where these are not here yet.
        dropped: what its files hold that is not a tensor.
        format: of the files that are written.
        recipes: how tensors are made that a single file does not hold as they are.
    """

    component: ModelPart
    folder: str
    format: FileFormat
    tensors: tuple[TensorPlan, ...]
    order: tuple[str, ...]
    files: tuple[FilePlan, ...]
    weights: WeightFiles
    dropped: tuple[LeftOut, ...] = ()
    recipes: Mapping[str, ReplayRecipe] = field(default_factory=dict)

    @property
    def bytes_in(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.bytes_in for tensor in self.tensors)


StreamedPlan = ComponentPlan | UnquantizedPlan
"""What passes through the engine tensor by tensor."""


@dataclass(frozen=True)
class LeftBehind:
    """A file or folder of the source that does not arrive, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Needs:
    """What the run will take, in bytes; of a device's memory what each GPU gives, the driver's part included."""

    disk_bytes: int
    device_peak_bytes: int
    host_peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """Every decision, before the first byte moves.

    Attributes:
        unquantized: the other parts of a pipeline that have weights.
        copied: files that are taken over unchanged.
        left_behind: what else the source holds.
        fetch: files of the source that must be local before the work starts.
        warnings: things that are not wrong but that the user should know.
        devices: where weights are quantized: the CPU, or one GPU or several of one machine.
        allow_cpu: a weight that does not fit the GPU goes to the CPU.
        loras: that are added.
        told: what else the user said on which bytes depend.
    """

    source: Source
    layout: ModelLayout
    output: Path
    devices: tuple[str, ...]
    components: tuple[ComponentPlan, ...]
    unquantized: tuple[UnquantizedPlan, ...]
    copied: tuple[CopyPlan, ...]
    left_behind: tuple[LeftBehind, ...]
    fetch: tuple[str, ...]
    needs: Needs
    warnings: tuple[str, ...]
    subfolder: str | None = None
    variant: str | None = None
    trust_remote_code: bool = False
    allow_cpu: bool = False
    loras: tuple[LoraFile, ...] = ()
    told: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """The device that the manifest names: the first."""
        return self.devices[0]

    @property
    def streamed(self) -> tuple[StreamedPlan, ...]:
        """Every model of which tensors are written."""
        return (*self.components, *self.unquantized)

    def to_dict(self) -> dict[str, Any]:
        """The document that ``aoconvert plan --json`` prints (see ``cli.md``: keys are a contract)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": {
                "kind": self.source.kind,
                "repo_id": self.source.repo_id,
                "revision": self.source.revision,
                "label": self.source.label,
                "subfolder": self.subfolder,
                "config": _config_dict(self.source),
                "loras": [_lora_dict(lora) for lora in self.loras],
            },
            "components": [_component_dict(item, self.device) for item in self.components],
            "unquantized": [_unquantized_dict(item) for item in self.unquantized],
            "copied": [{"path": item.path, "size": item.size} for item in self.copied],
            "left_behind": [asdict(item) for item in self.left_behind],
            "needs": asdict(self.needs),
            "warnings": list(self.warnings),
            "problems": [],
        }


def _config_dict(source: Source) -> dict[str, Any] | None:
    """Where the config of a single file comes from."""
    origin = getattr(source, "origin", None)
    return {key: value for key, value in asdict(origin).items() if key != "label"} if origin is not None else None


def _lora_dict(lora: LoraFile) -> dict[str, Any]:
    keys = ("label", "repo_id", "revision", "path", "weight", "size", "sha256")
    return {key: getattr(lora, key) for key in keys}


def _component_dict(component: ComponentPlan, device: str) -> dict[str, Any]:
    return {
        "name": component.component.name,
        "library": component.component.library,
        "class": component.component.class_name,
        "scheme": component.scheme_name,
        "config": config_dict(component.config),
        **({"original": asdict(component.original)} if component.original is not None else {}),
        "layout": layout_dict(component.layout, component.unconfirmed),
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "dtype": t.dtype,
                "action": t.action,
                "scheme": t.scheme.name if t.scheme is not None else None,
                "reason": t.reason,
                "bytes_in": t.bytes_in,
                "bytes_out": t.bytes_out,
                "device": "cpu" if device != "cpu" and t.scheme is not None and t.scheme.cpu_only else None,
                "file": t.file,
            }
            for t in component.tensors
        ],
        "missing": [asdict(item) for item in component.missing],
        "dropped": [asdict(item) for item in component.dropped],
        "files": [{"path": item.path, "size": item.size} for item in component.files],
        "totals": asdict(component.totals),
    }


def _unquantized_dict(part: UnquantizedPlan) -> dict[str, Any]:
    return {
        "name": part.component.name,
        "path": part.folder,
        "library": part.component.library,
        "class": part.component.class_name,
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.bytes_out, "file": t.file}
            for t in part.tensors
        ],
        "files": [{"path": item.path, "size": item.size} for item in part.files],
    }


def config_dict(config: AOBaseConfig) -> dict[str, Any]:
    """A torchao config as ``config_to_dict`` gives it, for config.json and the manifest."""
    from torchao.core.config import config_to_dict

    return dict(config_to_dict(config))


def layout_dict(layout: Layout, unconfirmed: str | None = None) -> Mapping[str, Any]:
    """What the stored weights are made for, with the manifest's keys."""
    return {
        "device": layout.device,
        "packing": layout.packing,
        "min_capability": list(layout.min_capability) if layout.min_capability else None,
        "requires": list(layout.requires),
        "unconfirmed": unconfirmed,
    }
