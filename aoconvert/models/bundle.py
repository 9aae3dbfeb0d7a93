"""A single file with all models of a pipeline in it: which of them diffusers finds there, and how it converts each.

``Pipeline.from_single_file`` gives the file's tensors to a function of each model's class, text encoders included. Here
these functions run on tensors without data; see :mod:`aoconvert.models.recording`.
Source: ``load_single_file_sub_model`` of ``diffusers.loaders.single_file``, and ``single_file_utils``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.environment import import_diffusers, quiet_imports
from aoconvert.errors import SourceError
from aoconvert.models.base import ModelPart, SourceTensor
from aoconvert.models.original_names import convert_names
from aoconvert.models.pipeline import ModelLayout, build_skeleton

if TYPE_CHECKING:
    import torch

    from aoconvert.models.recording import Step

OPTIONAL = frozenset({"safety_checker"})
"""What ``from_single_file`` never loads: SINGLE_FILE_OPTIONAL_COMPONENTS of ``diffusers.loaders.single_file``."""


@dataclass(frozen=True)
class Bundle:
    """What a file holds of a pipeline.

    Attributes:
        taken: model → names of the file's tensors that it is made of.
        absent: model → why it cannot be made of the file.
    """

    taken: Mapping[str, frozenset[str]]
    absent: Mapping[str, str]

    @property
    def elsewhere(self) -> dict[str, frozenset[str]]:
        """Model → names that other models take, and it does not."""
        names = frozenset().union(*self.taken.values())
        return {model: names - own for model, own in self.taken.items()}


def find_bundle(layout: ModelLayout, found: Mapping[str, SourceTensor], configs: Path, label: str) -> Bundle:
    """Which models of a pipeline a file holds.

    Args:
        layout: the pipeline's.
        found: the file's tensors.
        configs: the folder with the pipeline's configs.
        label: what messages call the file.
    """
    taken, absent = {}, {}
    for component in layout.components:
        if component.name in OPTIONAL:
            continue
        try:
            made = convert_part(component, found, configs, label)
        except SourceError as error:
            absent[component.name] = error.message
        else:
            taken[component.name] = frozenset(source.name for step in made.values() for source in step.sources)
    return Bundle(taken, absent)


def convert_part(component: ModelPart, found: Mapping[str, SourceTensor], configs: Path, label: str) -> dict[str, Step]:
    """What diffusers makes of a file's tensors for a model of a pipeline: state-dict key → how.

    Raises:
        SourceError: the file does not hold the whole model, or diffusers has no conversion for it.
    """
    import torch

    if component.library == "transformers":
        return _convert_text_encoder(component, found, configs, label)
    wanted = [spec.name for spec in build_skeleton(component, torch.bfloat16) if spec.tied_to is None]
    made = convert_names(component, found, wanted, label)
    if lacking := [name for name in wanted if name not in made]:
        raise SourceError(f"{label} lacks {lacking[0]} of {component.title}", hint="download the file again")
    return {name: made[name] for name in wanted}


def _convert_text_encoder(
    component: ModelPart, found: Mapping[str, SourceTensor], configs: Path, label: str
) -> dict[str, Step]:
    """A text encoder in the dtype of its tensors, as ``from_single_file`` makes it when that is asked for."""
    import torch

    steps = _load(component, found, configs, label, torch.bfloat16)
    stored = Counter(source.dtype for step in steps.values() for source in step.sources)
    dtype = stored.most_common(1)[0][0] if stored else torch.bfloat16
    return steps if dtype == torch.bfloat16 else _load(component, found, configs, label, dtype)


def _load(
    component: ModelPart, found: Mapping[str, SourceTensor], configs: Path, label: str, dtype: torch.dtype
) -> dict[str, Step]:
    import torch

    from aoconvert.models.recording import Recording, Step, constant

    import_diffusers()
    from diffusers.loaders import single_file_utils as library

    with quiet_imports():
        import transformers

    cls = getattr(transformers, component.class_name)
    tensors: dict[str, Any] = {
        name: Recording.of(Step(tensor.shape, tensor.dtype, tensor)) for name, tensor in found.items()
    }
    if library.is_clip_model_in_single_file(cls, tensors):
        load = library.create_diffusers_clip_model_from_ldm
    elif library.is_t5_in_single_file(tensors):
        load = library.create_diffusers_t5_model_from_checkpoint
    else:
        raise SourceError(f"{label} does not hold {component.title}", hint=_hint(component))
    where = {"config": str(configs), "subfolder": component.folder, "local_files_only": True}
    try:
        model = load(cls, checkpoint=tensors, torch_dtype=dtype, **where)
    except Exception as error:  # it takes for granted that the tensors are there
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"{label}: diffusers makes no {component.title} of it: {said}", hint=_hint(component)
        ) from error
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    made = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Recording):
            made[name] = _without_copies(tensor.step)
        elif isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            made[name] = constant(tensor)
        elif name not in tied:
            raise SourceError(f"{label} lacks {name} of {component.title}", hint=_hint(component))
    return made


def _hint(component: ModelPart) -> str:
    return f"--component-only writes the denoiser without {component.title} and the other parts"


def _without_copies(step: Step) -> Step:
    """The stored tensor, where all that was done is to hand it on."""
    import torch

    at = step
    while at.operation is not None and at.operation.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.alias):
        at = at.parents[0]
    return at if at.source is not None else step


def stored_name(component: ModelPart, name: str) -> str:
    """A state-dict key as checkpoints on the Hub have it: ``text_model.`` is in all of CLIP's, whatever the version."""
    if component.class_name == "CLIPTextModel" and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name
