"""A checkpoint as a model finds it: names, the library's own report, and the values that decide about ties."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.errors import SourceError
from aoconvert.models import Skeleton, join
from aoconvert.models.base import SourceTensor
from aoconvert.models.opening import Opening, ask
from aoconvert.models.ties import settle_ties
from aoconvert.options import QuantizeOptions
from aoconvert.planning.inventory import Inventory, SourceTensors, match
from aoconvert.planning.values import Values
from aoconvert.recipes.rules import Rules, allow_rules

if TYPE_CHECKING:
    import torch

    from aoconvert.sources import Source


@dataclass(frozen=True)
class SourceCheckpoint:
    """What a model finds in its checkpoint.

    Attributes:
        inventory: its tensors.
        opening: what the library says when it opens it.
        allowed: which tensors may be missing.
        drop_unknown: tensors that the model class does not know are left out.
        apart: pairs of tensors that are one by config or class, but differ.
    """

    inventory: Inventory
    opening: Opening
    allowed: Rules
    drop_unknown: bool = False
    apart: tuple[tuple[str, str], ...] = ()


def read_checkpoint(
    source: Source,
    skeleton: Skeleton,
    contents: SourceTensors,
    options: QuantizeOptions,
    dtype: torch.dtype,
    *,
    sharded: bool,
    code_root: Path | None,
) -> tuple[Skeleton, SourceCheckpoint]:
    """Ask the library what it makes of the headers, and compare what is declared one and is there twice.

    Args:
        source: holds the files.
        skeleton: with the ties that config and class declare.
        contents: of the weights files.
        options: what the user said.
        dtype: that the library casts to when it opens the model.
        sharded: the weights files have an index.
        code_root: folder with the checkpoint's own code; only given with ``--trust-remote-code``.

    Returns:
        The skeleton with its ties as they are, and what was found.

    Raises:
        SourceError: a file is damaged, or two files contradict each other.
    """
    _refuse_more_files(source, skeleton)
    inventory = match(skeleton, contents, sharded=sharded)
    given = contents.tensors if inventory.converted is None else inventory.converted
    tensors = {name: tensor for name, tensor in given.items() if name not in inventory.needs_data}
    opening = ask(skeleton.component, dtype, tensors, sharded=sharded, code_root=code_root)
    opening = replace(opening, missing=opening.missing - inventory.merged if inventory.needs_data else opening.missing)
    found = SourceCheckpoint(
        inventory, opening, Rules((), None, allow_rules(options.allow_missing)), options.drop_unknown
    )
    if not opening.shared and not opening.contested:
        return skeleton, found
    cast = None if options.dtype == "auto" else dtype
    with Values(source) as values:

        def are_equal(one: Collection[str], other: Collection[str]) -> bool:
            first, second = (_any_of(inventory, names) for names in (one, other))
            # what is merged is not compared: written apart, the library does it when it opens the result
            return first is not None and second is not None and values.are_equal(first, second, cast)

        skeleton, apart = settle_ties(skeleton, opening, are_equal)
    return skeleton, replace(found, apart=apart)


def _refuse_more_files(source: Source, skeleton: Skeleton) -> None:
    """Some classes of transformers read a head from a file of its own, whatever lies beside it.

    Source: ``extra_files`` of a config class, read by ``PreTrainedModel.from_pretrained``.

    Raises:
        SourceError: such a file is there.
    """
    names = getattr(type(getattr(skeleton.model, "config", None)), "extra_files", ())
    there = [name for name in names if source.has(join(skeleton.component.folder, name))]
    if there:
        raise SourceError(
            f"{skeleton.component.title}: its class also reads {', '.join(there)}, which aoconvert does not support",
            hint="open it with from_pretrained and save it with save_pretrained: then one file holds everything",
        )


def _any_of(inventory: Inventory, names: Collection[str]) -> SourceTensor | None:
    return next((inventory.direct[name] for name in sorted(names) if name in inventory.direct), None)
