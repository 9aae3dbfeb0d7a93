"""Which file holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aoconvert.errors import WriteError
from aoconvert.formats.registry import FileFormat
from aoconvert.models import ModelPart, join
from aoconvert.planning.types import FilePlan, TensorPlan
from aoconvert.sources.weights import STEMS

if TYPE_CHECKING:
    import torch

# The Hub takes files below 50 GB; diffusers cannot open a sharded .bin without being told (diffusers#14811).
DIFFUSERS_FILE_BYTES = 45 * 10**9
TRANSFORMERS_FILE_BYTES = 10 * 10**9


def weights_name(component: ModelPart, format_: FileFormat, number: int, count: int) -> str:
    """File name the component's library looks for; ``number`` counts from 1."""
    stem = STEMS[component.library][format_.name]
    return f"{stem}{format_.suffix}" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}{format_.suffix}"


def index_name(component: ModelPart, format_: FileFormat) -> str:
    """Name of the index beside sharded weights."""
    return f"{STEMS[component.library][format_.name]}{format_.suffix}.index.json"


def lay_out(
    component: ModelPart,
    format_: FileFormat,
    folder: str,
    planned: Sequence[TensorPlan],
    outputs: Mapping[str, torch.Tensor],
    order: Sequence[str],
    limit: int | None,
) -> tuple[tuple[TensorPlan, ...], tuple[str, ...], tuple[FilePlan, ...]]:
    """Deal tensors to files, and compute each file's exact size.

    Args:
        component: the model.
        format_: of its files.
        folder: its folder in the output.
        planned: its tensors, in state-dict order.
        outputs: what is written for them, on ``meta``.
        order: names as they lie in the source.
        limit: tensor bytes a file; ``None``: what the library can open.

    Returns:
        The tensors with their files, names in the order they are written, and the files.
    """
    default = DIFFUSERS_FILE_BYTES if component.library == "diffusers" else TRANSFORMERS_FILE_BYTES
    dealt = assign(planned, order, limit or default)
    where: dict[str, str] = {}
    files = []
    written = {name for names in dealt for name in names}
    if component.library == "transformers":  # gives every name to torchao's reader, which takes none without a dot
        written = {name for name in written if "." in name}
    whole = {tensor.name: outputs[tensor.name] for tensor in planned if tensor.name in written}
    for number, names in enumerate(dealt, start=1):
        path = join(folder, weights_name(component, format_, number, len(dealt)))
        where.update(dict.fromkeys(names, path))
        also = {tensor.name: tensor.same_as for tensor in planned if tensor.same_as in where}
        also = {name: same for name, same in also.items() if where[same] == path}
        where.update(dict.fromkeys(also, path))
        # the file lists tensors in state-dict order, their data lies in the order it was read
        listed = [tensor.name for tensor in planned if where.get(tensor.name) == path]
        outline = format_.writer.outline({name: outputs[name] for name in names}, listed, also, whole)
        files.append(FilePlan(path, outline.size, outline.head))
    tensors = tuple(replace(tensor, file=where.get(tensor.name)) for tensor in planned)
    return tensors, tuple(name for names in dealt for name in names), tuple(files)


def unstorable_problems(component: ModelPart, format_: FileFormat, outputs: Mapping[str, torch.Tensor]) -> list[str]:
    """What a format cannot store of a model, one line for each kind of tensor.

    Args:
        component: the model.
        format_: of its files.
        outputs: what is written, on ``meta``.
    """
    try:
        format_.writer.outline(outputs)
    except WriteError:
        pass
    else:
        return []
    found: dict[tuple[type, torch.dtype], str] = {}
    for name, tensor in outputs.items():
        try:
            format_.writer.outline({name: tensor})
        except WriteError as error:
            found.setdefault((type(tensor), tensor.dtype), f"{component.title}: {error.message} ({error.hint})")
    return list(found.values())


def assign(tensors: Sequence[TensorPlan], order: Sequence[str], limit: int) -> list[list[str]]:
    """Deal the tensors to files of at most ``limit`` bytes of tensors, in the order they will be written.

    A tensor larger than the limit gets a file of its own.
    """
    sizes = {tensor.name: tensor.bytes_out for tensor in tensors if tensor.action != "tied"}
    names = [name for name in order if name in sizes]
    ordered = set(names)
    names += [name for name in sizes if name not in ordered]
    files: list[list[str]] = [[]]
    used = 0
    for name in names:
        if files[-1] and used + sizes[name] > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += sizes[name]
    return files
