"""What is to be proven: a checkpoint's models, from its manifest, or from its configs where it has none.

Every value that later becomes part of a program is checked here: an identifier, a known keyword, a path inside the
folder. A hostile manifest must not inject anything.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from aoconvert.checkpoint.files import LOADED
from aoconvert.checkpoint.manifest import ComponentEntry, Manifest, TensorEntry
from aoconvert.errors import SourceError
from aoconvert.formats.registry import FORMATS, written_as
from aoconvert.formats.torch_bin.safe_names import list_names
from aoconvert.models import ModelLayout, ModelPart, identify, join
from aoconvert.schemes.imports import imports
from aoconvert.sources.folder import FolderSource
from aoconvert.sources.weights import find_weights

DTYPES = ("bfloat16", "float16", "float32")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_MODULE = re.compile(r"torchao(\.[A-Za-z_][A-Za-z0-9_]*){0,6}")
STATE_LIBRARY = "torch"
"""What a manifest gives as the library of a file of tensors of which nothing says the model."""
CODE_INSIDE = "its class is code inside the checkpoint, which opening it would run"
_TRUST = "trust_remote_code"
_KWARGS: Mapping[str, tuple[Any, ...]] = {"torch_dtype": DTYPES, "use_safetensors": (False,), _TRUST: (True,)}
_AUTO_CLASS = re.compile(r"AutoModel[A-Za-z0-9]{0,60}")


@dataclass(frozen=True)
class Part:
    """One quantized model of the checkpoint.

    Attributes:
        name: in a pipeline, ``""`` for a single model.
        folder: relative, ``""`` for the root.
        library, class_name, config: of the model.
        module: where a class is that its library does not have in its top level, see ``Component``.
        files: its weights files, relative to the checkpoint.
        dtype: of what is not quantized; ``None`` where the checkpoint does not say.
        kwargs: for ``from_pretrained``.
        auto_class: what opens it, where its class is code inside the checkpoint.
        safe_globals: names its pickles need beyond torch's own; ``None`` without a manifest.
        tensors: what the manifest says of each tensor, by name; ``None`` without a manifest.
        fused: its query, key and value projections were fused before they were quantized.
    """

    name: str
    folder: str
    library: Literal["diffusers", "transformers", "torch"]
    class_name: str
    config: Mapping[str, Any] = field(repr=False)
    files: tuple[str, ...]
    dtype: str | None
    kwargs: Mapping[str, Any]
    safe_globals: tuple[str, ...] | None
    tensors: Mapping[str, TensorEntry] | None = field(repr=False)
    fused: bool = False
    module: str | None = None
    auto_class: str | None = None

    @property
    def runs_code(self) -> bool:
        """Whether opening it runs code that is inside the checkpoint."""
        return _TRUST in self.kwargs


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to verify. ``kind`` says what ``from_pretrained`` of the folder gives."""

    folder: Path
    kind: Literal["pipeline", "diffusers", "transformers", "state_dict"]
    class_name: str
    parts: tuple[Part, ...]
    imports: tuple[str, ...]
    manifest: Manifest | None = field(repr=False)

    @property
    def files(self) -> tuple[str, ...]:
        """Every weights file that is loaded, those of parts that are not quantized too.

        A manifest lists nothing else; without one, what a training run left (``training_args.bin``) is not looked at.
        """
        found = [path for path in self.folder.rglob("*") if written_as(path.name) and path.is_file()]
        if self.manifest is None:
            found = [path for path in found if LOADED.fullmatch(path.name)]
        return tuple(sorted(path.relative_to(self.folder).as_posix() for path in found))

    @property
    def nbytes(self) -> int:
        """Bytes of everything in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def safe_globals(self) -> tuple[str, ...]:
        """All names that the pickles need beyond torch's own."""
        return tuple(sorted({name for part in self.parts for name in part.safe_globals or ()}))

    @property
    def fused(self) -> bool:
        """Whether a part has fused projections, which ``from_pretrained`` does not build."""
        return any(part.fused for part in self.parts)

    @property
    def runs_code(self) -> bool:
        """Whether opening it runs code that is inside the checkpoint."""
        return any(part.runs_code for part in self.parts)


def validate(manifest: Manifest) -> None:
    """Check every value of a manifest that later becomes part of a program.

    Raises:
        SourceError: a value that has no business there.
    """
    known = list_names()
    for entry in manifest.components:
        _identifier(entry.class_name)
        if entry.name:
            _identifier(entry.name)
        if entry.fused_qkv and entry.library != "diffusers":
            raise SourceError(
                f"the manifest says that {entry.class_name} has fused projections, which only diffusers models can have"
            )
        for name in entry.imports:
            if not _MODULE.fullmatch(name):
                raise SourceError(f"the manifest wants to import {name!r}, which is not part of torchao")
        for key, value in entry.load.kwargs.items():
            if value not in _KWARGS.get(key, ()):
                raise SourceError(f"the manifest wants to load {entry.class_name} with {key}={value!r}")
        if entry.load.class_name != entry.class_name and not (
            _TRUST in entry.load.kwargs and _AUTO_CLASS.fullmatch(entry.load.class_name)
        ):
            raise SourceError(f"the manifest wants to load {entry.class_name} with {entry.load.class_name[:100]!r}")
        for name in entry.safe_globals:
            if name not in known:
                raise SourceError(f"the manifest asks for {name!r}, which is not in the list of safe names")


def from_manifest(folder: Path, manifest: Manifest, *, alone: bool = False) -> Checkpoint:
    """What the manifest says is there.

    Args:
        folder: where it is.
        manifest: of it.
        alone: also take a file of tensors of which nothing says the model; its ``kind`` is ``state_dict``.

    Raises:
        SourceError: a value that has no business in a manifest, or configs that contradict it.
    """
    validate(manifest)
    imports = {name for entry in manifest.components for name in entry.imports}
    if any(entry.library == STATE_LIBRARY for entry in manifest.components):
        if not alone:
            raise SourceError(
                f"{folder} is a file of tensors alone: nothing says which model it is for",
                hint="put the model's config.json beside the old file, and migrate the folder",
            )
        return _state_dict(folder, manifest, sorted(imports))
    layout = identify(FolderSource(folder))
    parts = tuple(_part(folder, layout, entry) for entry in manifest.components)
    return Checkpoint(folder, layout.kind, _identifier(layout.class_name), parts, tuple(sorted(imports)), manifest)


def _state_dict(folder: Path, manifest: Manifest, imports: list[str]) -> Checkpoint:
    """A file of tensors: it can be loaded and compared, but no model be made of it."""
    parts = tuple(
        Part(
            name=entry.name,
            folder=entry.path,
            library=entry.library,
            class_name=entry.class_name,
            config={},
            files=tuple(file.path for file in entry.files if FORMATS[entry.format].writes(file.path)),
            dtype=None,
            kwargs={},
            safe_globals=tuple(entry.safe_globals),
            tensors={tensor.name: tensor for tensor in entry.tensors},
        )
        for entry in manifest.components
    )
    return Checkpoint(folder, "state_dict", _identifier(parts[0].class_name), parts, tuple(imports), manifest)


def _part(folder: Path, layout: ModelLayout, entry: ComponentEntry) -> Part:
    # one component of a pipeline, written by itself, has the name that it had there
    component = layout.component(entry.name if layout.kind == "pipeline" else "")
    if component is None or component.folder != entry.path:
        raise SourceError(f"the manifest names a component {entry.name!r} in {entry.path!r}, which does not exist")
    if (component.library, component.class_name) != (entry.library, entry.class_name):
        raise SourceError(
            f"{component.title}: config.json says {component.class_name}, but the manifest says {entry.class_name}"
        )
    needs_code = _needs_code(folder, layout, component, entry)
    return Part(
        name=component.name,
        folder=entry.path,
        library=entry.library,
        class_name=entry.class_name,
        config=component.config,
        files=tuple(file.path for file in entry.files if FORMATS[entry.format].writes(file.path)),
        dtype=entry.dtype if entry.dtype in DTYPES else None,
        kwargs={key: value for key, value in entry.load.kwargs.items() if key != _TRUST or needs_code},
        safe_globals=tuple(entry.safe_globals),
        tensors={tensor.name: tensor for tensor in entry.tensors},
        fused=entry.fused_qkv,
        auto_class=entry.load.class_name if needs_code and entry.load.class_name != entry.class_name else None,
        module=_identifier(entry.module) if entry.module is not None else None,
    )


def _needs_code(folder: Path, layout: ModelLayout, component: ModelPart, entry: ComponentEntry) -> bool:
    """Whether the library needs code inside the checkpoint to open a model, or the pipeline around it.

    A manifest may ask for trust that nothing needs: nobody is asked for it then, and it is not given. diffusers looks
    for a part's code in the part's folder (``pipeline_loading_utils.get_class_obj_and_candidates``).
    """
    if _TRUST not in entry.load.kwargs:
        return False
    if entry.load.class_name != entry.class_name:
        auto_map = component.config.get("auto_map")
        return isinstance(auto_map, dict) and entry.load.class_name in auto_map
    return layout.own_code or any((folder / part.name / f"{part.library}.py").is_file() for part in layout.parts)


def from_folder(folder: Path, label: str | None = None) -> Checkpoint:
    """A torchao checkpoint by somebody else: what its configs say.

    Args:
        folder: where it is.
        label: what messages call it; default: the folder's name.

    Raises:
        SourceError: no config, or no torchao model in it.
    """
    source = FolderSource(folder, label)
    layout = identify(source)
    parts = []
    for component in layout.components:
        quantization = component.config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "torchao":
            continue
        weights = find_weights(source, component.folder, component.library, config=component.config)
        dtype = component.config.get("dtype") or component.config.get("torch_dtype")
        if component.library == "diffusers":
            dtype = "bfloat16"  # diffusers' configs do not say, and torchao models are made in it
        parts.append(
            Part(
                name=_identifier(component.name) if component.name else "",
                folder=component.folder,
                library=component.library,
                class_name=_identifier(component.class_name),
                config=component.config,
                files=weights.files if weights is not None else (),
                dtype=dtype if dtype in DTYPES else None,
                kwargs={"torch_dtype": dtype} if component.library == "diffusers" else {},
                safe_globals=None,
                tensors=None,
            )
        )
    if not parts:
        raise SourceError(
            f"{source.label} holds no torchao model: no config.json with a torchao quantization_config",
            hint="run aoconvert inspect to see what it is",
        )
    return Checkpoint(folder, layout.kind, _identifier(layout.class_name), tuple(parts), ("torchao",), None)


def with_imports(target: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """A checkpoint without a manifest, and the modules that register the names in its pickles."""
    return replace(target, imports=tuple(imports(names)))


def _identifier(name: str) -> str:
    if not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise SourceError(f"{name[:100]!r} is not a class name")
    return name


def config_path(part: Part) -> str:
    """Where the part's ``config.json`` is, relative to the checkpoint."""
    return join(part.folder, "config.json")
