"""What a source holds: a diffusers pipeline, a diffusers model or a transformers model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from aoconvert.environment import quiet_imports
from aoconvert.errors import SourceError
from aoconvert.models.base import Library, ModelPart, Skeleton
from aoconvert.models.configs import MODELOPT_FILE, with_modelopt
from aoconvert.models.unknown import check_class_keys, explain_unknown
from aoconvert.sources.base import is_safe_path

if TYPE_CHECKING:
    import torch
    from torch import nn

    from aoconvert.sources import Source

# the parts of a pipeline that denoise: they hold nearly all of the compute, and are what people quantize
DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")
# and where none has such a name (prior, decoder, image_unet), those of such a class
_DENOISER_CLASSES = re.compile(r".*(Transformer|UNet|Prior).*")

# class name → the file that its from_pretrained begins with; models have config.json
_CONFIG_NAMES = {
    re.compile(r".*Scheduler"): "scheduler_config.json",
    re.compile(r".*Tokenizer(Fast)?"): "tokenizer_config.json",
    re.compile(r".*(FeatureExtractor|Processor)(Fast|Pil)?"): "preprocessor_config.json",
    re.compile(r".*(Guidance|Guider)"): "guider_config.json",
}


@dataclass(frozen=True)
class PipelinePart:
    """An entry of model_index.json: a model, a scheduler, a tokenizer, …

    Attributes:
        name: the pipeline's name for it.
        folder: where it is in the source; that of the pipeline for what has none of its own.
        library: ``"diffusers"``, ``"transformers"``, a module of diffusers' pipelines, or a file of code beside it.
        class_name: its class there.
    """

    name: str
    folder: str
    library: str
    class_name: str

    @property
    def config_name(self) -> str:
        """The file that its ``from_pretrained`` begins with, by its class name."""
        return next((name for kind, name in _CONFIG_NAMES.items() if kind.fullmatch(self.class_name)), "config.json")


@dataclass(frozen=True)
class ModelLayout:
    """A source's models.

    Attributes:
        kind: what ``from_pretrained`` of the folder gives.
        folder: where in the source it starts, ``""`` for the root.
        class_name: pipeline class, or the model's.
        components: the models in it; one, named ``""``, where ``kind`` is not ``pipeline``.
        parts: everything that a pipeline's model_index.json names, models included.
        own_code: the pipeline's class is in a file of code beside model_index.json.
    """

    kind: Literal["pipeline", "diffusers", "transformers"]
    folder: str
    class_name: str
    components: tuple[ModelPart, ...]
    parts: tuple[PipelinePart, ...] = field(default=())
    own_code: bool = False

    def component(self, name: str) -> ModelPart | None:
        """The component of that name, or ``None``."""
        return next((item for item in self.components if item.name == name), None)

    @property
    def default_components(self) -> tuple[ModelPart, ...]:
        """What is quantized when nobody says otherwise: the denoiser of a pipeline, or the model."""
        if self.kind != "pipeline":
            return self.components
        named = tuple(item for item in self.components if item.name in DENOISERS)
        models = (item for item in self.components if item.library == "diffusers")
        return named or tuple(item for item in models if _DENOISER_CLASSES.fullmatch(item.class_name))


def join(folder: str, path: str) -> str:
    """``folder/path``, where the folder may be the root ``""``."""
    return f"{folder}/{path}" if folder else path


def _single(source: Source, folder: str, config: Mapping[str, Any], name: str = "") -> ModelPart | None:
    where = join(folder, "config.json")
    declared = config.get("_class_name")
    if isinstance(declared, str):
        return ModelPart(name, folder, "diffusers", declared, config)
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return ModelPart(name, folder, "transformers", architectures[0], config)
    if "model_type" in config:
        raise SourceError(
            f"{source.label}: {where} names no architectures, so the model class is unknown",
            hint='add "architectures": ["<class name>"] to it',
        )
    return None


def _pipeline(source: Source, folder: str, index: Mapping[str, Any]) -> ModelLayout:
    entries = {name: entry for name, entry in index.items() if not name.startswith("_") and _is_part(entry)}
    parts = [_find_part(source, folder, PipelinePart(name, folder, *entry)) for name, entry in entries.items()]
    parts += [more for part in parts for more in _further_folders(source, part, index)]
    found = (_component(source, part) for part in parts)
    components = tuple(component for component in found if component is not None)
    class_name = index.get("_class_name")
    own_code = isinstance(class_name, list)  # [the file, class]
    if isinstance(class_name, list):
        class_name = class_name[-1] if class_name else None
    if not isinstance(class_name, str):
        raise SourceError(f"{source.label}: model_index.json has no _class_name", hint="is this a diffusers pipeline?")
    return ModelLayout("pipeline", folder, class_name, components, tuple(parts), own_code)


def _is_part(entry: Any) -> bool:
    """Whether a value of model_index.json is ``[library, class]``.

    Others are settings of the pipeline, and ``[null, null]`` stands for a part that it does not have.
    """
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)


def _find_part(source: Source, folder: str, part: PipelinePart) -> PipelinePart:
    """The part with its own folder, or in the pipeline's, where diffusers looks for what has none.

    Raises:
        SourceError: it is in neither.
    """
    own = join(folder, part.name)
    if is_safe_path(part.name) and "/" not in part.name:
        if any(path.startswith(f"{own}/") for path in source.files()):
            return replace(part, folder=own)
        if source.has(join(folder, part.config_name)):
            return part
    raise SourceError(
        f"{source.label}: {join(folder, 'model_index.json')} names the part {part.name!r}, which does not exist",
        hint="download the whole pipeline again",
    )


def _further_folders(source: Source, part: PipelinePart, index: Mapping[str, Any]) -> Iterator[PipelinePart]:
    """Where a part is a list of models, those behind the first: in ``controlnet_1``, ``controlnet_2`` and so on.

    Such a class has no config of its own, so that of the first folder names another one.
    Source: ``from_pretrained`` of ``MultiControlNetModel`` and ``MultiAdapter``.
    """
    config = join(part.folder, "config.json")
    if part.library != "diffusers" or not source.has(config):
        return
    if _config(source, config).get("_class_name") in (None, part.class_name):
        return
    for number in itertools.count(1):
        more = replace(part, name=f"{part.name}_{number}", folder=f"{part.folder}_{number}")
        if more.name in index or not source.has(join(more.folder, "config.json")):
            return
        yield more


def _component(source: Source, part: PipelinePart) -> ModelPart | None:
    """The model that a part is; ``None`` where it is a scheduler, a tokenizer, or whatever else has no weights.

    A model of diffusers says its class in its config; any other class of a pipeline's own has a base class of
    transformers.
    """
    config = join(part.folder, "config.json")
    if not source.has(config):
        return None
    values = _config(source, config)
    if "_class_name" not in values and part.config_name != "config.json":
        return None
    if part.library in ("diffusers", "transformers"):
        library, module = part.library, None
    else:
        library, module = "diffusers" if "_class_name" in values else "transformers", part.library
    return ModelPart(part.name, part.folder, cast(Library, library), part.class_name, values, module)


def identify(source: Source, subfolder: str | None = None) -> ModelLayout:
    """Find out what the source (or its ``subfolder``) holds.

    Raises:
        SourceError: no config, or one that names no class; already quantized.
    """
    folder = (subfolder or "").strip("/")
    if folder and not any(path.startswith(f"{folder}/") for path in source.files()):
        raise SourceError(f"{source.label} has no folder {folder!r}", hint="check --subfolder")
    index = join(folder, "model_index.json")
    if source.has(index):
        return _pipeline(source, folder, _mapping(source, index))
    config = join(folder, "config.json")
    if not source.has(config):
        raise explain_unknown(source, folder)
    values = _with_modelopt(source, folder, _config(source, config))
    check_class_keys(source, config, values)
    component = _single(source, folder, values)
    if component is None:
        raise SourceError(
            f"{source.label}: {config} has neither _class_name (diffusers) nor architectures (transformers)",
            hint="give the folder of a model, not of one of its parts",
        )
    return ModelLayout(component.library, folder, component.class_name, (component,))


def _config(source: Source, path: str) -> Mapping[str, Any]:
    """A model's config; one of transformers may name other files, each for a version of the library and later ones."""
    values = _mapping(source, path)
    names = values.get("configuration_files")
    if not isinstance(names, list) or "_class_name" in values:
        return values
    from transformers.configuration_utils import get_configuration_file

    name = get_configuration_file([name for name in names if isinstance(name, str)])
    return _mapping(source, join(path.rpartition("/")[0], name))


def _with_modelopt(source: Source, folder: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    path = join(folder, MODELOPT_FILE)
    return with_modelopt(config, _mapping(source, path)) if source.has(path) else config


def _mapping(source: Source, path: str) -> Mapping[str, Any]:
    values = source.read_json(path)
    if not isinstance(values, dict):
        raise SourceError(f"{source.label}: {path} is not a JSON object", hint="download it again")
    return values


def refuse_quantized(component: ModelPart) -> None:
    """Refuse a model whose config says that its weights are quantized.

    Raises:
        SourceError: it does.
    """
    quantized = component.config.get("quantization_config")
    if isinstance(quantized, dict) and quantized:
        method = quantized.get("quant_method", "an unknown method")
        raise SourceError(
            f"{component.title} is already quantized ({method})", hint="start from the original, unquantized model"
        )


def build_skeleton(
    component: ModelPart, dtype: torch.dtype, *, code_root: Path | None = None, fuse_qkv: bool = False
) -> Skeleton:
    """The empty model of a component, by its library.

    Args:
        component: the component.
        dtype: what floating tensors will be cast to.
        code_root: folder with the checkpoint's own code; only given with ``--trust-remote-code``.
        fuse_qkv: with one matrix for query, key and value, where a diffusers model offers that.

    Raises:
        CannotFuse: its projections cannot be fused, see :mod:`aoconvert.models.fused`.
        SourceError: the class is unknown, does not take the config, or the weights are quantized already.
    """
    refuse_quantized(component)
    if component.library == "diffusers":
        from aoconvert.models import diffusers, fused

        if fuse_qkv:
            return fused.skeleton(component)
        return diffusers.skeleton(component, code_root=code_root)
    if fuse_qkv:
        from aoconvert.models.fused import CannotFuse

        raise CannotFuse(f"{component.title}: only diffusers models can be fused", hint="leave out --fuse-qkv")
    from aoconvert.models import transformers

    with quiet_imports():  # a model class imports transformers' quantizers, and those more of torchao
        return transformers.skeleton(component, dtype, code_root=code_root)


def rebuild(skeleton: Skeleton, dtype: torch.dtype, *, buffers: bool = False) -> nn.Module:
    """A skeleton's empty model once more, as ``from_pretrained`` builds it for ``dtype``; with real ``buffers``."""
    component = skeleton.component
    if component.library == "diffusers":
        from aoconvert.models import diffusers, fused

        model = diffusers.empty_model(component, dtype, code_root=skeleton.code_root, buffers=buffers)
        if skeleton.fused:
            fused.fuse(model)
        return model
    from aoconvert.models import transformers

    return transformers.empty_model(component, dtype, code_root=skeleton.code_root, buffers=buffers)
