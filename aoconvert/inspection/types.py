"""What ``inspect`` says, as frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aoconvert.formats.torch_bin.contents import BinTensor


@dataclass(frozen=True)
class TensorFact:
    """A tensor of the model, as the file's header says it.

    Attributes:
        name: in the state dict.
        class_name: dotted; ``torch.Tensor`` for a plain one.
        dtype: of what is stored, without ``torch.``.
        numel: parameters it stands for; 0 for what only helps another one (a scale, packed metadata).
        scheme: what it is quantized to; ``None`` for a plain one.
        entry: all that the pickle says of it; ``None`` in other formats.
    """

    name: str
    class_name: str
    dtype: str
    numel: int
    scheme: str | None = None
    entry: BinTensor | None = None


@dataclass(frozen=True)
class FileFacts:
    """What the header of one weights file says.

    Attributes:
        path: relative to what is inspected.
        size: bytes.
        format: ``bin``, ``safetensors`` or ``gguf``.
        stored: tensors in the file.
        tensors: tensors of the model, see ``TensorFact``; those of GGUF are not read.
        kind: what the header alone makes it: ``torchao``, ``quanto``, ``plain``, ... .
        globals: every name in its pickle.
        metadata: of a safetensors or GGUF header.
        unsafe: why it must not be loaded; then nothing else is known.
    """

    path: str
    size: int
    format: str
    stored: int = 0
    tensors: tuple[TensorFact, ...] = ()
    kind: str = "plain"
    globals: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    unsafe: str | None = None

    @property
    def classes(self) -> dict[str, int]:
        """Tensors by class."""
        return count(tensor.class_name for tensor in self.tensors)


@dataclass(frozen=True)
class Loading:
    """Which torchao loads it and computes the right values.

    Attributes:
        minimum, maximum: releases, both included; ``maximum`` is ``None`` where the newest known one still does. Both
            are ``None`` where no release does, or torchao is not needed.
        why: what sets the limits, one sentence each.
        best: the newest of the releases that ask for the least before ``torch.load(weights_only=True)``.
        imports: modules to import first with that release, so that it accepts the classes.
        safe_globals: names that it does not register itself, for ``torch.serialization.safe_globals``.
        possible: whether any release loads it.
    """

    minimum: str | None
    maximum: str | None
    why: tuple[str, ...] = ()
    best: str | None = None
    imports: tuple[str, ...] = ()
    safe_globals: tuple[str, ...] = ()
    possible: bool = True


@dataclass(frozen=True)
class Component:
    """One model: all of a checkpoint, or a part of a pipeline.

    Attributes:
        name: in the pipeline; ``""`` for a model by itself.
        kind: ``torchao``, ``torchao-safetensors``, ``quanto``, ``bitsandbytes``, ``gguf``, ``compressed-tensors``,
            ``gptq``, ``awq``, any other ``quant_method``, ``plain``, or ``unreadable``.
        library: ``diffusers``, ``transformers`` or ``None``.
        class_name: of the model.
        scheme: what most of its quantized parameters are in; several are joined by ``+``.
        files: its weights.
        layout_device: ``any``, or the device type that the packed weights are for.
        min_capability: CUDA compute capability that the layout needs.
        written_by: see ``aoconvert.inspection.writer``.
        loading: torchao releases that load it; ``None`` where torchao is not what loads it.
        needs: packages that load it, by distribution name, beside torch.
        problems: why it cannot be loaded here.
        advice: what to do, or to know.
        loads_here: ``None`` where that is not known.
    """

    name: str
    kind: str
    library: str | None
    class_name: str | None
    scheme: str | None
    files: tuple[FileFacts, ...]
    layout_device: str
    min_capability: tuple[int, int] | None
    written_by: Mapping[str, Any]
    loading: Loading | None
    needs: tuple[str, ...]
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    loads_here: bool | None

    @property
    def tensor_classes(self) -> dict[str, int]:
        """Tensors by class."""
        return count(tensor.class_name for file in self.files for tensor in file.tensors)

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(tensor.numel for file in self.files for tensor in file.tensors)

    @property
    def quantized_parameters(self) -> int:
        """Parameters that are quantized."""
        return sum(tensor.numel for file in self.files for tensor in file.tensors if tensor.scheme)

    @property
    def bytes(self) -> int:
        """Bytes of the weights files."""
        return sum(file.size for file in self.files)

    @property
    def unsafe(self) -> tuple[str, ...]:
        """Why files must not be loaded."""
        return tuple(file.unsafe for file in self.files if file.unsafe)

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` shows it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "library": self.library,
            "class": self.class_name,
            "scheme": self.scheme,
            "files": [
                {
                    "path": file.path,
                    "size": file.size,
                    "format": file.format,
                    "tensors": file.stored,
                    "classes": file.classes,
                    "globals": list(file.globals),
                }
                for file in self.files
            ],
            "tensor_classes": self.tensor_classes,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "bytes": self.bytes,
            "layout_device": self.layout_device,
            "min_capability": list(self.min_capability) if self.min_capability else None,
            "written_by": dict(self.written_by),
            "globals": sorted({name for file in self.files for name in file.globals}),
            "loads_with": {"torchao": _torchao(self.loading), "packages": list(self.needs)},
            "loads_here": self.loads_here,
            "why_not": "; ".join(self.problems) or None,
            "advice": list(self.advice),
            "unsafe": list(self.unsafe),
        }


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is and what can load it.

    Attributes:
        path: as it was asked for.
        revision: commit of a Hub repo.
        library, class_name: of the pipeline, or of the only component.
        components: one for a model, several for a pipeline.
        bytes_fetched: bytes of bodies that came over the network for this.
        next_command: what to type next, see ``aoconvert.inspection.next_command``.
    """

    path: str
    revision: str | None
    library: str | None
    class_name: str | None
    components: tuple[Component, ...]
    bytes_fetched: int
    next_command: str | None = None

    @property
    def quantized(self) -> tuple[Component, ...]:
        """The components that are not plain; all, where every one is."""
        return tuple(part for part in self.components if part.kind != "plain") or self.components

    @property
    def kind(self) -> str:
        """The kinds of the components that are not plain, joined by ``+``."""
        return _join(part.kind for part in self.quantized) or "plain"

    @property
    def scheme(self) -> str | None:
        """The schemes of the components, joined by ``+``."""
        return _join(part.scheme for part in self.quantized if part.scheme)

    @property
    def loads_here(self) -> bool | None:
        """Whether every component loads here; ``None`` where that is not known of one."""
        answers = [part.loads_here for part in self.components]
        return False if False in answers else None if None in answers else True

    @property
    def unsafe(self) -> tuple[str, ...]:
        """Why files must not be loaded; then the command line exits with 4."""
        return tuple(reason for part in self.components for reason in part.unsafe)

    def to_dict(self) -> dict[str, Any]:
        """The document of ``aoconvert inspect --json``; the keys are stable.

        ``path, revision, kind, library, class, scheme``; ``files``: a list of ``{path, size, format, tensors, classes,
        globals}``; ``tensor_classes``: class to count; ``parameters, quantized_parameters, bytes, layout_device``;
        ``written_by``: ``{tool, torchao, torch, python, diffusers, transformers, torchao_range: {min, max}, how}``,
        ``null`` where nothing says it; ``globals``; ``loads_with``: ``{torchao: {min, max, why, best, possible,
        imports, safe_globals} or null, packages}``; ``loads_here``: true, false or null; ``why_not``; ``advice``;
        ``unsafe``; ``bytes_fetched``; ``next``: a command, or null; ``components``: the same keys for each part.
        """
        parts = [part.to_dict() for part in self.components]
        main = self.quantized[0].to_dict()
        several = [part.to_dict() for part in self.quantized]
        return {
            "path": self.path,
            "revision": self.revision,
            "kind": self.kind,
            "library": self.library,
            "class": self.class_name,
            "scheme": self.scheme,
            "files": [file for part in parts for file in part["files"]],
            "tensor_classes": _sum(part["tensor_classes"] for part in parts),
            "parameters": sum(part["parameters"] for part in parts),
            "quantized_parameters": sum(part["quantized_parameters"] for part in parts),
            "bytes": sum(part["bytes"] for part in parts),
            "layout_device": _join(part["layout_device"] for part in several if part["layout_device"] != "any")
            or "any",
            "written_by": main["written_by"],
            "globals": sorted({name for part in parts for name in part["globals"]}),
            "loads_with": main["loads_with"],
            "loads_here": self.loads_here,
            "why_not": _join((part["why_not"] for part in parts if part["why_not"]), "; "),
            "advice": list(dict.fromkeys(line for part in parts for line in part["advice"])),
            "unsafe": list(self.unsafe),
            "bytes_fetched": self.bytes_fetched,
            "next": self.next_command,
            "components": parts,
        }


def count(names: Iterable[str]) -> dict[str, int]:
    """How often each name comes, most often first."""
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _sum(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for table in tables:
        for name, number in table.items():
            total[name] = total.get(name, 0) + number
    return total


def _join(words: Iterable[str], glue: str = "+") -> str | None:
    return glue.join(dict.fromkeys(words)) or None


def _torchao(loading: Loading | None) -> dict[str, Any] | None:
    if loading is None:
        return None
    return {
        "min": loading.minimum,
        "max": loading.maximum,
        "why": list(loading.why),
        "best": loading.best,
        "possible": loading.possible,
        "imports": list(loading.imports),
        "safe_globals": list(loading.safe_globals),
    }
