"""The plan of a pipeline's parts that are not quantized: the same tensors, in files of the output's format.

diffusers opens a repo of the Hub with one kind of file for all its weights: as soon as a part has none in safetensors,
it fetches no safetensors at all (``pipeline_loading_utils._get_ignore_patterns``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from aoconvert.errors import SourceError
from aoconvert.formats.dtypes import dtype_name
from aoconvert.formats.registry import FORMATS, FileFormat
from aoconvert.models import ModelLayout, ModelPart, join
from aoconvert.models.base import SourceTensor
from aoconvert.models.bundle import convert_part, stored_name
from aoconvert.models.own_classes import is_model
from aoconvert.options import QuantizeOptions
from aoconvert.planning.files import lay_out, weights_name
from aoconvert.planning.inventory import read_contents
from aoconvert.planning.types import Action, FilePlan, LeftOut, TensorPlan, UnquantizedPlan
from aoconvert.planning.weights import weights_of
from aoconvert.sources.weights import NAMED_BY

if TYPE_CHECKING:
    from aoconvert.models.recording import Step
    from aoconvert.sources import Source
    from aoconvert.sources.weights import WeightFiles

ONNX = "OnnxRuntimeModel"
"""A class whose weights are ``model.onnx``."""

_REASON = "not chosen"


def plan_unquantized(
    source: Source, layout: ModelLayout, chosen: Iterable[ModelPart], options: QuantizeOptions
) -> tuple[UnquantizedPlan, ...]:
    """Plan every part of a pipeline that has weights and was not chosen.

    Raises:
        SourceError: a file is damaged, or must not be read.
    """
    folders = {component.folder for component in chosen}
    parts = [component for component in layout.components if component.folder not in folders]
    found = ((component, weights_of(source, component, options.variant)) for component in parts)
    return tuple(
        _plan(source, layout, component, weights, options.max_shard_size, FORMATS[options.format])
        for component, weights in found
        if weights is not None
    )


def part_problems(source: Source, layout: ModelLayout, chosen: Iterable[ModelPart], variant: str | None) -> list[str]:
    """Parts of a pipeline that were not chosen and lack what their class cannot be opened without, one line each."""
    models = {component.name: component for component in layout.components}
    names = {component.name for component in chosen}
    problems = []
    for part in layout.parts:
        if part.name in names:
            continue
        component = models.get(part.name)
        if component is not None and weights_of(source, component, variant) is not None:
            continue
        if component is None and part.config_name != "config.json":
            continue
        if is_model(part.library, part.class_name) is False or part.class_name == ONNX:
            continue
        missing = "weights" if component is not None else "config.json"
        where = join(source.label, part.folder)
        problems.append(
            f"{part.name}: no {missing} in {where}, and {part.class_name} cannot be opened without it (download the "
            f"whole pipeline again, or set it to [null, null] in model_index.json where it is optional)"
        )
    return problems


def _plan(
    source: Source,
    layout: ModelLayout,
    component: ModelPart,
    weights: WeightFiles,
    limit: int | None,
    format_: FileFormat,
) -> UnquantizedPlan:
    import torch

    if component.library == "transformers" and component.config.get(NAMED_BY) is not None:
        raise SourceError(  # its config arrives as it is, and would lead to a file that is not there
            f"{component.title}: its config.json names its weights ({NAMED_BY}), which aoconvert supports only for "
            f"parts that it quantizes",
            hint=f"--component {component.title}, or remove {NAMED_BY} from the config and use the usual file names",
        )
    folder = component.folder.removeprefix(f"{layout.folder}/" if layout.folder else "")
    contents = read_contents(source, weights, component.name)
    if contents is None:  # a .bin on the Hub: what it holds is known when it is here
        size = sum(source.files()[path].size for path in weights.files)
        files = (FilePlan(join(folder, weights_name(component, format_, 1, 1)), size),)
        return UnquantizedPlan(component, folder, format_, (), (), files, weights)
    if contents.configs is not None and contents.single_file is not None:
        made = convert_part(component, contents.tensors, contents.configs, contents.single_file)
        return _plan_converted(component, made, weights, folder, format_)
    found = contents.tensors
    planned = _tensors(found)
    outputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in found.items()}
    if component.library == "diffusers":  # it cannot open a sharded .bin without being told
        limit = 1 + sum(tensor.nbytes for tensor in found.values())
    dropped = tuple(LeftOut(name, why) for name, why in contents.others.items())
    return UnquantizedPlan(
        component,
        folder,
        format_,
        *lay_out(component, format_, folder, planned, outputs, list(found), limit),
        weights,
        dropped,
    )


def _plan_converted(
    component: ModelPart, made: Mapping[str, Step], weights: WeightFiles, folder: str, format_: FileFormat
) -> UnquantizedPlan:
    """A part of a pipeline that is in a single file: each tensor as the library makes it, in one file."""
    import torch

    from aoconvert.models.recording import ReplayRecipe

    steps = {stored_name(component, name): step for name, step in made.items()}
    order = sorted(steps, key=lambda name: (-steps[name].dtype.itemsize, name))
    planned = []
    for name in order:
        step, dtype = steps[name], dtype_name(steps[name].dtype)
        tensor = _whole(name, step.shape, dtype, step.nbytes)
        recipe = ReplayRecipe(name, step)
        if step.source is not None:
            tensor = replace(tensor, origin=(step.source.file, step.source.name))
        else:
            tensor = replace(tensor, working_bytes=recipe.working_bytes(name, step.dtype))
        planned.append(tensor)
    outputs = {name: torch.empty(step.shape, dtype=step.dtype, device="meta") for name, step in steps.items()}
    limit = 1 + sum(step.nbytes for step in steps.values())
    laid_out = lay_out(component, format_, folder, planned, outputs, order, limit)
    recipes = {name: ReplayRecipe(name, step) for name, step in steps.items() if step.source is None}
    return UnquantizedPlan(component, folder, format_, *laid_out, weights, recipes=recipes)


def _whole(name: str, shape: tuple[int, ...], dtype: str, nbytes: int) -> TensorPlan:
    """A tensor that is written as it is."""
    return TensorPlan(
        name=name,
        shape=shape,
        dtype=dtype,
        source_dtype=dtype,
        action="keep",
        reason=_REASON,
        candidate=False,
        parameter=True,
        embedding=False,
        bytes_in=nbytes,
        bytes_out=nbytes,
        origin=None,
    )


def _tensors(found: Mapping[str, SourceTensor]) -> list[TensorPlan]:
    """Each tensor as it is; of those that share their data in a torch file, the first is written."""
    first: dict[tuple[object, ...], str] = {}
    planned = []
    for name, tensor in found.items():
        place = (tensor.file, tensor.place, tensor.dtype, tensor.shape)
        same = first.setdefault(place, name) if tensor.place is not None and tensor.nbytes else name
        dtype = dtype_name(tensor.dtype)
        written = same == name
        entry = _whole(name, tensor.shape, dtype, tensor.nbytes if written else 0)
        where = (tensor.file, tensor.name) if written else None
        action: Action = "keep" if written else "tied"
        planned.append(replace(entry, action=action, origin=where, same_as=None if written else same))
    return planned
