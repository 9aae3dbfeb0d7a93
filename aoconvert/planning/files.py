"""Which file holds which tensor."""

from __future__ import annotations

from collections.abc import Sequence

from aoconvert.formats.registry import FileFormat
from aoconvert.models import ModelPart
from aoconvert.planning.types import TensorPlan
from aoconvert.sources.weights import STEMS

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
