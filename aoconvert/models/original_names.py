"""How diffusers converts the tensors of one model in a single file, in the names of its authors.

Source: ``diffusers.loaders.single_file_model`` and ``single_file_utils``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.humanize import with_article
from aoconvert.models.base import ModelPart, SourceTensor

if TYPE_CHECKING:
    from aoconvert.models.recording import Step


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
        f"{label}: its tensors are not those of {with_article(component.class_name)} in a layout that diffusers knows",
        hint="check that --config is the config of this file",
    )
