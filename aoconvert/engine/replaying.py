"""Tensors of a single file whose names and shapes diffusers converts: made by the steps that it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from aoconvert.models.conversions import room
from aoconvert.models.recording import Replay, ReplayRecipe

if TYPE_CHECKING:
    from aoconvert.models.base import Load, Rows
    from aoconvert.planning.inventory import Readable


class Replayed:
    """Makes each tensor, or rows of it, when it is asked for.

    What cannot be made in rows is made whole, and kept until another tensor is asked for.

    Args:
        recipes: state-dict key → how it is made.
        load: where the file's tensors come from.
    """

    def __init__(self, recipes: Mapping[str, ReplayRecipe], load: Load) -> None:
        self._recipes = recipes
        self._replay = Replay(load)
        self._kept: tuple[str, torch.Tensor] | None = None

    def read(self, tensor: Readable, rows: Rows | None, into: torch.Tensor | None) -> torch.Tensor:
        """The tensor, or its rows (start, stop), contiguous; in ``into``, uint8 memory, where it fits.

        Raises:
            ReadError: a disk error.
        """
        step = self._recipes[tensor.name].step
        if rows is None or step.streams:
            self._kept = None
            part = self._replay.make(step, rows)
        else:
            if self._kept is None or self._kept[0] != tensor.name:
                self._kept = None  # before the next is made
                self._kept = (tensor.name, self._replay.make(step))
            part = self._kept[1][rows[0] : rows[1]]
        return room(tuple(part.shape), part.dtype, into).copy_(part)

    def close(self) -> None:
        """Release memory."""
        self._kept = None
