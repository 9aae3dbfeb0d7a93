"""Models in one file, in the names of their authors: which config such a file has, and how diffusers converts it.

``from_single_file`` takes the config of a pipeline that it knows for the layout, and gives the tensors to a function of
the class. Here that function runs on tensors without data, and what it did is done again when they are read.
Source: ``diffusers.loaders.single_file_model`` and ``single_file_utils``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aoconvert.environment import import_diffusers
from aoconvert.errors import HubError, SourceError, UsageError
from aoconvert.formats.registry import SOURCE_FORMATS
from aoconvert.models.base import SourceTensor
from aoconvert.models.bundle import OPTIONAL, find_bundle
from aoconvert.models.gguf import make_tokenizer, quantization, read_config
from aoconvert.models.pipeline import ModelLayout, identify
from aoconvert.options import HubOptions
from aoconvert.sources import Source, resolve
from aoconvert.sources.bundle import BundleSource
from aoconvert.sources.file import ConfigOrigin, FileSource
from aoconvert.sources.weights import find_weights

if TYPE_CHECKING:
    from aoconvert.formats.base import FileContents

_CONFIG_HINT = "--config FOLDER or REPO names the diffusers pipeline or model whose config it has"


def add_config(
    source: FileSource, config: str | None, subfolder: str | None, hub: HubOptions, *, whole: bool = False
) -> FileSource:
    """The file with the config of the model that it holds, or with those of all models of a pipeline.

    Args:
        source: the file.
        config: a folder or repo with the config of the model, or of a pipeline that has it; ``None``: what diffusers
            takes for such a file, or what transformers makes of a GGUF file.
        subfolder: where it is in there.
        hub: how the Hub is asked.
        whole: take the whole pipeline, where the file holds it.

    Raises:
        SourceError: nothing knows the layout, or there is no config.
        HubError: the config is not in the cache and the Hub could not be asked, or said no.
        UsageError: a pipeline of several denoisers.
    """
    hub = replace(hub, revision=None)
    stored = quantization(source.place) if source.place.suffix.lower() == ".gguf" else None
    if config is None and stored is not None and not (stored["values"] is None and _find_layout(source)):
        values: Mapping[str, Any] = read_config(source.place, stored)
        made, why = make_tokenizer(source.place)
        return FileSource(source.place, {**values, "quantization_config": stored}, note=why, made=made)
    if config is None:
        known, repo, folder = _infer(source)
        try:
            found = resolve(repo, hub)
        except HubError as error:
            raise HubError(
                f"{source.label}: for the layout {known}, diffusers takes its config from {repo}: {error.message}",
                hint=_CONFIG_HINT,
                retryable=error.retryable,
            ) from error
        subfolder = subfolder or folder
    else:
        found = resolve(config, hub)
    layout, note = identify(found, subfolder), None
    parts = layout.default_components
    if len(parts) != 1:
        names = ", ".join(part.folder for part in parts)
        raise UsageError(
            f"{found.label} has {len(parts)} denoisers ({names}), {source.label} is one",
            hint=f"--subfolder {parts[0].folder}" if parts else "--subfolder names the model's folder in it",
        )
    if whole and stored is None and not subfolder and layout.kind == "pipeline":
        origin = ConfigOrigin(found.label, found.repo_id, found.revision, inferred=config is None)
        bundle = open_bundle(source, found, layout, origin)
        if isinstance(bundle, BundleSource):
            return bundle
        note = bundle
    [part] = parts
    values = {"_class_name": part.class_name, **part.config} if part.library == "diffusers" else part.config
    if stored is not None:
        values = {**values, "quantization_config": stored}
    origin = ConfigOrigin(found.label, found.repo_id, found.revision, part.folder, inferred=config is None)
    return FileSource(source.place, values, origin, (subfolder or "").strip("/"), note)


def open_bundle(
    source: FileSource, around: Source, layout: ModelLayout, origin: ConfigOrigin | None
) -> BundleSource | str | None:
    """The file as the pipeline that it is.

    Returns:
        ``None`` where it holds a denoiser alone; where it holds some of the other models and lacks some, what it lacks.

    Args:
        source: the file.
        around: the pipeline whose configs it has.
        layout: of that pipeline.
        origin: where that is; ``None`` for the result itself.
    """
    if origin is None:  # a result: its configs say that it is quantized
        layout = identify(BundleSource(source.place, around, None, {}))
    models = [component for component in layout.components if component.name not in OPTIONAL]
    if len(models) < 2 or any("/" in component.folder for component in models):
        return None
    found = {
        name: SourceTensor(source.label, name, info.dtype, info.shape, info.nbytes, info.place)
        for name, info in _contents(source).tensors.items()
    }
    bundle = find_bundle(layout, found, around.root, source.label)
    denoisers = {component.name for component in layout.default_components}
    if bundle.absent:
        others = bundle.taken.keys() - denoisers
        lacking, without = (", ".join(sorted(names)) for names in (bundle.absent, others))
        return f"the file holds no {lacking}: it is converted without {without}" if others else None
    null = [part.name for part in layout.parts if part.name in OPTIONAL]
    return BundleSource(source.place, around, origin, bundle.elsewhere, null)


def _contents(source: FileSource) -> FileContents:
    weights = find_weights(source, "", "diffusers")
    assert weights is not None
    contents = SOURCE_FORMATS[weights.format].contents(source, source.label)
    assert contents is not None
    return contents


def _infer(source: FileSource) -> tuple[str, str, str | None]:
    """What diffusers calls the layout, and the repo and folder that it takes the config from.

    Raises:
        SourceError: it is a layout that diffusers does not know.
    """
    if (found := _find_layout(source)) is None:
        raise SourceError(f"{source.label}: its tensors are in no layout that diffusers knows", hint=_CONFIG_HINT)
    return found


def _find_layout(source: FileSource) -> tuple[str, str, str | None] | None:
    """As ``_infer``; ``None`` for a layout that diffusers does not know: it would take it for Stable Diffusion 1's."""
    import torch

    import_diffusers()
    from diffusers.loaders import single_file_utils as utils

    tensors = _contents(source).tensors
    found = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()}
    try:
        layout = utils.infer_diffusers_model_type(found)
        known = layout != "v1" or utils.CHECKPOINT_KEY_NAMES["v1"] in found
        path = utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[layout] if known else None
    except Exception:  # it looks for what is not there
        path = None
    if path is None:
        return None
    return layout, path["pretrained_model_name_or_path"], path.get("subfolder")
