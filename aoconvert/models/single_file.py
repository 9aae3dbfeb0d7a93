"""Models in one file, in the names of their authors: which config such a file has, and how diffusers converts it.

``from_single_file`` takes the config of a pipeline that it knows for the layout, and gives the tensors to a function of
the class. Here that function runs on tensors without data, and what it did is done again when they are read.
Source: ``diffusers.loaders.single_file_model`` and ``single_file_utils``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aoconvert.environment import import_diffusers
from aoconvert.errors import HubError, SourceError, UsageError
from aoconvert.formats.registry import SOURCE_FORMATS
from aoconvert.models.base import ModelPart, SourceTensor
from aoconvert.models.gguf import quantization, read_config
from aoconvert.models.pipeline import identify
from aoconvert.options import HubOptions
from aoconvert.sources import resolve
from aoconvert.sources.file import ConfigOrigin, FileSource
from aoconvert.sources.weights import find_weights

if TYPE_CHECKING:
    from aoconvert.models.recording import Step

_CONFIG_HINT = "--config FOLDER or REPO names the diffusers pipeline or model whose config it has"


def add_config(source: FileSource, config: str | None, subfolder: str | None, hub: HubOptions) -> FileSource:
    """The file with the config of the model that it holds.

    Args:
        source: the file.
        config: a folder or repo with the config of the model, or of a pipeline that has it; ``None``: what diffusers
            takes for such a file, or what transformers makes of a GGUF file.
        subfolder: where it is in there.
        hub: how the Hub is asked.

    Raises:
        SourceError: nothing knows the layout, or there is no config.
        HubError: the config is not in the cache and the Hub could not be asked, or said no.
        UsageError: a pipeline of several denoisers.
    """
    hub = replace(hub, revision=None)
    stored = quantization(source.place) if source.place.suffix.lower() == ".gguf" else None
    if config is None and stored is not None and not (stored["values"] is None and _find_layout(source)):
        values: Mapping[str, Any] = read_config(source.place, stored)
        origin = ConfigOrigin(source.label, inferred=True)
        return FileSource(source.place, {**values, "quantization_config": stored}, origin)
    if config is None:
        layout, repo, folder = _infer(source)
        try:
            found = resolve(repo, hub)
        except HubError as error:
            raise HubError(
                f"{source.label}: for the layout {layout}, diffusers takes its config from {repo}: {error.message}",
                hint=_CONFIG_HINT,
                retryable=error.retryable,
            ) from error
        subfolder = subfolder or folder
    else:
        found = resolve(config, hub)
    parts = identify(found, subfolder).default_components
    if len(parts) != 1:
        names = ", ".join(part.folder for part in parts)
        raise UsageError(
            f"{found.label} has {len(parts)} denoisers ({names}), {source.label} is one",
            hint=f"--subfolder {parts[0].folder}" if parts else "--subfolder names the model's folder in it",
        )
    [part] = parts
    values = {"_class_name": part.class_name, **part.config} if part.library == "diffusers" else part.config
    if stored is not None:
        values = {**values, "quantization_config": stored}
    origin = ConfigOrigin(found.label, found.repo_id, found.revision, part.folder, inferred=config is None)
    return FileSource(source.place, values, origin, (subfolder or "").strip("/"))


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

    weights = find_weights(source, "", "diffusers")
    assert weights is not None
    contents = SOURCE_FORMATS[weights.format].contents(source, source.label)
    assert contents is not None
    found = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in contents.tensors.items()}
    try:
        layout = utils.infer_diffusers_model_type(found)
        known = layout != "v1" or utils.CHECKPOINT_KEY_NAMES["v1"] in found
        path = utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[layout] if known else None
    except Exception:  # it looks for what is not there
        path = None
    if path is None:
        return None
    return layout, path["pretrained_model_name_or_path"], path.get("subfolder")


def convert_names(
    component: ModelPart, found: Mapping[str, SourceTensor], wanted: Collection[str], label: str
) -> dict[str, Step]:
    """What diffusers makes of a file's tensors: state-dict key → how.

    Args:
        component: the model.
        found: the file's tensors.
        wanted: the model's state-dict keys.
        label: what messages call the file.

    Raises:
        SourceError: diffusers has no conversion for the class, or the tensors are not in a layout that it knows.
    """
    from diffusers.loaders import single_file_model as library

    from aoconvert.models.diffusers import model_class
    from aoconvert.models.recording import CannotRecord, record

    cls = model_class(component)
    if not library._should_convert_state_dict_to_diffusers(dict.fromkeys(wanted), dict.fromkeys(found)):
        return record(lambda tensors: tensors, found)
    loadable = library._get_single_file_loadable_mapping_class(cls)
    if loadable is None:
        raise SourceError(
            f"{label}: diffusers opens no {component.class_name} from a single file",
            hint="check that --config is the config of this file",
        )
    convert = library.SINGLE_FILE_LOADABLE_CLASSES[loadable]["checkpoint_mapping_fn"]

    def run(tensors: dict[str, Any]) -> Mapping[str, Any]:
        made: Mapping[str, Any] = convert(config=dict(component.config), checkpoint=tensors)
        return made

    try:
        made = record(run, found)
    except CannotRecord as why:
        raise SourceError(
            f"{label}: diffusers' conversion for {component.class_name} needs all tensors at once: {why}",
            hint="open it with from_single_file, save it with save_pretrained, and quantize that folder",
        ) from why
    except Exception as error:  # it takes for granted that the tensors are there
        raise _unknown(component, label) from error
    if not made.keys() & set(wanted):
        raise _unknown(component, label)
    return made


def _unknown(component: ModelPart, label: str) -> SourceError:
    return SourceError(
        f"{label}: its tensors are not those of a {component.class_name} in a layout that diffusers knows",
        hint="check that --config is the config of this file",
    )
