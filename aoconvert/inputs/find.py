"""The search: from a first guess, by repairs, to arguments that the model's forward takes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .blanks import Blank, State, make
from .docs import read_docstring
from .facts import Facts, read_facts
from .guesses import guesses
from .library import Source, Start
from .outputs import first_tensors
from .repairs import repairs
from .trial import Attempt, attempt, base_dtype, empty_copy, is_quantized, needs_values, on_meta, roomy_copy

TRIES = 400
SECONDS = 20.0
_ONE = 10.0  # seconds that a single attempt may take after that
_PATIENCE = 0.997  # what is left of an attempt's rank after each repair of it that was tried
_NO_FURTHER = 0.9  # of one that got no further than what it was to repair
_UNCHANGED = 0.5  # of one that failed in the same way as what it was to repair


class NoInputs(Exception):
    """The model's forward took none of the arguments that were tried; ``closest`` is the error of the best of them."""

    def __init__(self, closest: BaseException | None, tries: int) -> None:
        lines = str(closest).strip().splitlines() or [""]
        tried = "1 input was" if tries == 1 else f"{tries} inputs were"
        super().__init__(f"{tried} tried; {type(closest).__name__}: {lines[0]}")
        self.closest = closest
        self.tries = tries


@dataclass(frozen=True)
class Found:
    """Arguments that a forward pass takes.

    Attributes:
        state: what they are.
        dtype: of what is ``normal`` among them.
        tries: how many were tried.
        proof: what took them: a model that is not quantized, with ``values``; one without weights, so that only the
            ``shapes`` are known to be right; or ``nothing``, as the rest depends on values that could not be had.
        finite: whether everything that such a model gave is finite; ``None`` where there were no values.
        source: who made them, but for what the search added.
    """

    state: State
    dtype: torch.dtype
    tries: int
    proof: Literal["values", "shapes", "nothing"]
    finite: bool | None = None
    source: Source = "search"

    def make(self, device: str = "cpu") -> dict[str, Any]:
        """The keyword arguments: the same each time, with a batch of one where no pipeline made them."""
        return {name: make(value, self.dtype, device) for name, value in self.state.items()}


@dataclass(eq=False)
class _Node:
    """An attempt that failed, and what is still to be tried in its place; ``asked``: how much of it was."""

    rank: float
    state: State
    source: Source
    rest: Iterator[State]
    outcome: Attempt
    asked: int = 0

    def next_repair(self, seen: set[str]) -> State | None:
        """The next repair that was not tried yet."""
        self.asked += 1
        self.rank *= _PATIENCE
        return next((state for state in self.rest if repr(state) not in seen), None)


@dataclass(frozen=True)
class _Taken:
    """Arguments and what came of them; ``whole``: the pass went to its end."""

    state: State
    source: Source
    output: Any
    whole: bool


@dataclass
class _Search:
    facts: Facts
    dtype: torch.dtype
    tries: int
    deadline: float
    seen: set[str] = field(default_factory=set)
    done: int = 0
    best: tuple[Start, Attempt] | None = None
    gains: list[_Node] = field(default_factory=list)

    def spent(self) -> bool:
        return self.done >= self.tries or time.thread_time() > self.deadline

    def run(self, model: nn.Module, starts: Iterable[Start]) -> _Taken | None:
        """Best first: what gets furthest is repaired first; ``None`` where nothing is taken."""
        queue: list[_Node] = []
        for start in starts:
            outcome = self.take(model, start)
            if isinstance(outcome, _Taken):
                return outcome
            if isinstance(outcome.error, (NameError, ImportError)):  # a package is missing: no repair helps
                continue
            if (
                start.source != "dummy_inputs"
            ):  # these are of the base class, mostly: they serve as they are, or not at all
                queue.append(self.node(start, outcome, None))
        while queue and not self.spent():
            parent = self.next(queue)
            repaired = parent.next_repair(self.seen)
            if repaired is None:
                queue.remove(parent)
                self.gains = [node for node in self.gains if node is not parent]
                continue
            start = Start(parent.source, repaired)
            outcome = self.take(model, start)
            if isinstance(outcome, _Taken):
                return outcome
            queue.append(self.node(start, outcome, parent))
        return None

    def next(self, queue: list[_Node]) -> _Node:
        """What to repair now; every third time one that is neglected, so that a good start does not lead astray."""
        if self.done % 3 == 0 and self.gains:
            return min(self.gains, key=lambda node: node.asked)
        return max(queue, key=lambda node: node.rank)

    def failure(self, tries: int) -> NoInputs:
        """What to raise where nothing is taken."""
        return NoInputs(self.best[1].error if self.best is not None else None, tries)

    def take(self, model: nn.Module, start: Start) -> _Taken | Attempt:
        """Try one: taken also where ``meta`` can say no more."""
        state = start.state
        device = "meta" if on_meta(model) else "cpu"
        self.seen.add(repr(state))
        self.done += 1
        until = max(self.deadline, time.thread_time() + _ONE)
        outcome = attempt(model, {name: make(value, self.dtype, device) for name, value in state.items()}, until)
        if outcome.error is None:
            return _Taken(state, start.source, outcome.output, whole=True)
        if device == "meta" and needs_values(outcome.error):
            return _Taken(state, start.source, None, whole=False)
        if self.best is None or outcome.progress > self.best[1].progress:
            self.best = start, outcome
        return outcome

    def node(self, start: Start, outcome: Attempt, parent: _Node | None) -> _Node:
        """Where the attempt stands among the others."""
        state = start.state
        rank = float(outcome.progress) if parent is None else _rank(state, outcome, parent)
        node = _Node(rank, state, start.source, repairs(self.facts, state, outcome), outcome)
        if parent is None or rank >= parent.rank:
            self.gains.append(node)
        return node


def _rank(state: State, outcome: Attempt, parent: _Node) -> float:
    """How promising a repair is that failed, too."""
    progress = float(outcome.progress)
    if outcome.where == parent.outcome.where:
        return progress * _UNCHANGED
    if len(state) > len(parent.state):
        return max(progress, parent.rank)  # what was missing is there now, be it in a wrong shape
    if outcome.progress <= parent.outcome.progress:
        return min(progress, parent.rank) * _NO_FURTHER
    return progress


def find_inputs(model: nn.Module, own: Iterable[Start] = (), *, tries: int = TRIES, seconds: float = SECONDS) -> Found:
    """Keyword arguments of a smallest forward pass.

    They are looked for on an empty copy of the model, which costs neither memory nor much time; what depends on values
    is settled on ``model`` itself, or on a copy of it that is not quantized.

    Args:
        model: opened by its library, or without weights.
        own: what its library made for it, the most trustworthy first; tried before anything is guessed.
        tries: how many may be tried.
        seconds: how long that may take, on each copy, in time of the processor: what is found must not depend on how
            busy the machine is.

    Raises:
        NoInputs: none was taken.
    """
    facts, dtype = read_facts(model), base_dtype(model)
    starts = [*own, *(Start("search", state) for state in _starts(facts, model.forward.__doc__))]
    empty = model if on_meta(model) else empty_copy(model)
    trial = None if on_meta(model) else roomy_copy(model) if is_quantized(model) else model
    done, taken, search = 0, None, None
    for tried in (empty, trial):
        if tried is None:
            continue
        search = _Search(facts, dtype, tries, time.thread_time() + seconds)
        if taken := search.run(tried, starts):
            starts = [Start(taken.source, taken.state), *starts]
        elif search.best is not None:  # meta lacks an operation now and then
            starts = [search.best[0], *starts]
        done += search.done
    if taken is None:
        raise NoInputs(None, 0) if search is None else search.failure(done)
    if trial is None:
        return Found(taken.state, dtype, done, "shapes" if taken.whole else "nothing", None, taken.source)
    return Found(taken.state, dtype, done, "values", _finite(taken.output), taken.source)


def _finite(output: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in first_tensors(output))


def _starts(facts: Facts, doc: str | None) -> Iterator[State]:
    """What the signature asks for, and the main input; a second time in the shapes that its docstring gives."""
    required = [name for name, p in facts.parameters.items() if p.default is inspect.Parameter.empty]
    main = [name for name in facts.main if name in facts.parameters and name not in required]
    if not required and not main:
        main = [name for name in ("input_ids", "hidden_states", "sample") if name in facts.parameters][:1]
    names = [*main, *required]
    state = {name: _first(facts, name) for name in names}
    encoder_decoder = facts.find("is_encoder_decoder") and "decoder_input_ids" in facts.parameters
    if encoder_decoder:
        yield {**state, "decoder_input_ids": _first(facts, "decoder_input_ids")}
    yield state
    if (described := read_docstring(facts, doc, names)) is not None:
        yield described


def _first(facts: Facts, name: str) -> Any:
    found = guesses(facts, name)
    return found[0] if found else Blank((1,))
