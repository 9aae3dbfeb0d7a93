"""What stacks of experts are multiplied by: the rows that a mixture routes to each expert, and which expert that is.

transformers keeps the experts of a layer in one parameter, and multiplies them one after the other or all at once (see
``aoconvert.models.experts``). The rows are noted where the library's own forward multiplies them, below all of its
code: a product by a view of the stack is one by the expert at that address. Where it copies the matrices first
(``batched_mm``), nothing is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# operator → the places of the rows and of the matrix in its arguments
_ONE = {"aten::mm": (0, 1), "aten::addmm": (1, 2)}
_ALL = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")

Rows = tuple[int, torch.Tensor]
"""An expert, and the rows that it multiplies."""


def list_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, torch.Tensor]]]:
    """The modules that own stacks of experts: name, module, and the stacks by their names in it.

    What is not in memory while no pass runs (offloaded) is left out.
    """
    for name, module in model.named_modules():
        stacks: dict[str, torch.Tensor] = {
            own: parameter
            for own, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3 and not parameter.is_meta
        }
        if stacks:
            yield name, module, stacks


class Listener(TorchDispatchMode):
    """Notes the rows of one call of a module.

    Attributes:
        found: name of a stack → its rows.
        transposed: stacks whose matrices are (in, out).
    """

    def __init__(self, stacks: dict[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stacks = stacks
        self.found: dict[str, list[Rows]] = {}
        self.transposed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note a product by one of the stacks."""
        name = func.name().partition(".")[0]
        if name in _ONE:
            at, matrix = _ONE[name]
            self._note(args[at], args[matrix], None)
        elif name in _ALL:
            given = [*args, *(kwargs or {}).values()]
            self._note(args[0], args[1], next((item for item in given[2:] if isinstance(item, torch.Tensor)), None))
        return func(*args, **(kwargs or {}))

    def _note(self, rows: torch.Tensor, matrix: torch.Tensor, ends: torch.Tensor | None) -> None:
        for name, stack in self._stacks.items():
            away = matrix.data_ptr() - stack.data_ptr()
            if not 0 <= away < stack.nbytes or rows.dim() != 2:
                continue
            if matrix.stride(-1) == 1 < matrix.stride(-2):
                self.transposed.add(name)
            if ends is None:
                self._keep(name, away // (stack.stride(0) * stack.element_size()), rows)
            else:
                begin = 0
                for expert, end in enumerate(ends.tolist()):
                    self._keep(name, expert, rows[begin:end])
                    begin = end

    def _keep(self, name: str, expert: int, rows: torch.Tensor) -> None:
        if len(rows):
            self.found.setdefault(name, []).append((expert, rows.detach()))


def choose_rows(found: list[Rows], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose up to ``most`` rows, evenly spaced in those of each expert, but at least one of each.

    Returns:
        The rows, and which expert each is for (int32); both on the CPU.
    """
    total = sum(len(rows) for _, rows in found)
    chosen, experts = [], []
    for expert, rows in found:
        count = min(len(rows), max(1, most * len(rows) // total))
        places = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()
        chosen.append(rows[places.to(rows.device)].cpu())
        experts += [expert] * count
    return torch.cat(chosen).contiguous(), torch.tensor(experts, dtype=torch.int32)


def listen(model: nn.Module, done: Callable[[str, Listener], None]) -> list[Any]:
    """Have each module that owns stacks of experts say what they were multiplied by in its first call.

    Args:
        model: that runs.
        done: is given the module's name and what was noted.

    Returns:
        Hooks, to be removed.
    """
    handles = []
    for name, module, stacks in list_stacks(model):
        call = _Call(name, stacks, done)
        handles += [
            module.register_forward_pre_hook(call.begin),
            module.register_forward_hook(call.end, always_call=True),
        ]
    return handles


class _Call:
    """Hooks of one module."""

    def __init__(self, name: str, stacks: dict[str, torch.Tensor], done: Callable[[str, Listener], None]) -> None:
        self._name, self._done = name, done
        self._waiting: Listener | None = Listener(stacks)
        self._running: Listener | None = None

    def begin(self, *_: Any) -> None:
        if self._waiting is not None:
            self._running, self._waiting = self._waiting, None
            self._running.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: Any) -> None:
        if self._running is not None:
            listener, self._running = self._running, None
            listener.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._done(self._name, listener)
