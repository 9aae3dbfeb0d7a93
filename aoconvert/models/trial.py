"""Can this layer run so? The model's own forward is asked, on a copy without weights.

A scheme is made for ``linear(x, weight)``. Some classes use a weight in another way (they transpose it, scale it in
place, hand it to a fused attention), and torchao's tensor classes know few operations: such a layer loads, and dies
when it is used. Others cannot run in the dtype that was asked for at all. None of it is written anywhere.

The copy is on ``meta``, with every layer at its real size, and costs no memory. A forward that looks at values cannot
run there; its copy has real activations, and what its large weights make of them is zeros. What the answers depend on
is known beforehand, so they are remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aoconvert.cache import key as key_of
from aoconvert.cache import remember
from aoconvert.environment import quiet_imports, version_of
from aoconvert.models.base import Skeleton
from aoconvert.models.pipeline import rebuild

if TYPE_CHECKING:
    import torch
    from torch import nn

    from aoconvert.inputs import Found
    from aoconvert.models.forward_watch import Watch

# What was found must not depend on how busy the machine is: these are far off
_SECONDS = 120.0
_TRIES = 400  # inputs
_SEARCH = 30.0  # seconds of the processor
_LARGER = 16  # inputs that are larger; as many are tried,
_TAKEN = 4  # and of those that are taken so many
_FACTORS = (2, 1024)  # so much larger that of a sound more than one frame is left behind a codec's convolutions
_SMALL = 1 << 16  # values of a parameter that may be real
_PACKAGES = ("torch", "torchao", "transformers", "diffusers", "accelerate")

S = TypeVar("S")
Dtypes = Mapping[str, "torch.dtype"]
Quantized = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Seen:
    """What a forward of the model, not quantized, has shown.

    Attributes:
        values: whether it looks at values; ``None`` where no forward is known that runs, and nothing is known then.
        rows: state-dict key of a weight → most rows that it is multiplied with, for one sample.
        error: why the model does not run in its dtypes, where it does in float32.
    """

    values: bool | None
    rows: Mapping[str, int]
    error: str | None = None


def trial_of(skeleton: Skeleton, dtypes: Dtypes) -> Trial:
    """The trial of a model: the same one for the same question, so that a process asks nothing twice.

    Args:
        skeleton: the empty model; others like it are built for the runs.
        dtypes: of its tensors when they are used.
    """
    trial = Trial(skeleton, dtypes)
    if len(_trials) > _KEPT:
        _trials.clear()
    return _trials.setdefault(trial.key, trial)


class Trial:
    """Forwards of one model, and what is remembered of them.

    Args:
        skeleton: the empty model.
        dtypes: of its tensors.
    """

    def __init__(self, skeleton: Skeleton, dtypes: Dtypes) -> None:
        self._skeleton = skeleton
        self._dtypes = dtypes
        facts = {
            "library": skeleton.component.library,
            "class": skeleton.component.class_name,
            "config": skeleton.component.config,
            "fused": bool(skeleton.fused),
            "dtypes": {name: str(dtype) for name, dtype in dtypes.items()},
            "ties": {spec.name: spec.tied_to for spec in skeleton if spec.tied_to},
            "own code": str(skeleton.code_root),
            "versions": _versions(),
        }
        self.key = key_of(facts)
        self._answers: dict[str, Any] = {}

    def faults(
        self,
        wanted: Mapping[str, S],
        quantize: Callable[[torch.Tensor, S], torch.Tensor],
        key: Callable[[S], str],
    ) -> Mapping[str, str]:
        """Find the weights that the model's forward cannot use once they are quantized.

        Args:
            wanted: state-dict key of a weight → its scheme.
            quantize: gives what is written for a weight on ``meta``, also on ``meta``.
            key: the same for schemes that make the same of every weight.

        Returns:
            State-dict key → why not, in words; nothing where no forward is known that runs.
        """
        if not wanted or self.seen.values is None:
            return {}
        question = {name: key(scheme) for name, scheme in wanted.items()}
        answer: Mapping[str, str] | None = self._ask(
            question, lambda: self._faults(self._quantize_on_meta(wanted, quantize))
        )
        return answer or {}

    @cached_property
    def seen(self) -> Seen:
        """What a forward that is not quantized shows."""
        answer = self._ask("forward", lambda: asdict(self._look()))
        return Seen(**answer) if answer is not None else Seen(None, {})

    def _ask(self, question: Any, make: Callable[[], Any]) -> Any:
        """The answer to a question about the model; ``None`` where there was no time, or no memory, for one."""
        from aoconvert.models.deadline import TookTooMuch

        facts = [self.key, question]
        name = key_of(facts)
        if name not in self._answers:
            try:
                # a class that is in the checkpoint may be another one tomorrow
                own = self._skeleton.code_root is not None
                self._answers[name] = make() if own else remember("trials", facts, make)
            except TookTooMuch:
                self._answers[name] = None
        return self._answers[name]

    def _look(self) -> Seen:
        wide = _in_float32(self._dtypes)
        given = self._given
        if given is None:
            return Seen(None, {})
        for values in (False, True):
            outcome = self._attempt(given, self._dtypes, {}, values=values)
            if not isinstance(outcome, Exception):
                return Seen(values, self._most_rows(given, outcome.rows, values=values))
            # a CPU lacks some operations for small floats that every GPU has
            if wide == self._dtypes or (values and "not implemented" in str(outcome)):
                continue
            if not isinstance(self._attempt(given, wide, {}, values=values), Exception):
                return Seen(None, {}, f"{type(outcome).__name__}: {outcome}".splitlines()[0])
        return Seen(None, {})

    def _most_rows(self, given: Found, rows: Mapping[str, int], *, values: bool) -> Mapping[str, int]:
        """Rows with larger inputs, too: of a short enough one every layer sees a single row.

        Only for layers that are not expected to.
        """
        most = dict(rows)
        usual = {spec.name for spec in self._skeleton if spec.single_row}
        taken = 0
        for larger in islice(_enlarge(given, _FACTORS[: 1 if values else None]), _LARGER):
            if taken == _TAKEN or all(count > 1 or name in usual for name, count in most.items()):
                break
            outcome = self._attempt(larger, self._dtypes, {}, values=values)
            if not isinstance(outcome, Exception):
                taken += 1
                most = {name: max(count, outcome.rows.get(name, 0)) for name, count in most.items()}
        return most

    def _faults(self, quantized: Quantized) -> Mapping[str, str]:
        given = self._given
        if given is None:
            return {}
        outcome = self._attempt(given, self._dtypes, quantized, values=bool(self.seen.values))
        if not isinstance(outcome, Exception):
            return outcome.faults
        # nothing that passed by one of torch's functions: each kind of layer is tried alone
        faults: dict[str, str] = {}
        for kind in _kinds(self._skeleton, quantized):
            outcome = self._attempt(given, self._dtypes, kind, values=bool(self.seen.values))
            if isinstance(outcome, Exception):
                faults |= dict.fromkeys(kind, _cannot_run(self._skeleton, kind, outcome))
            else:
                faults |= outcome.faults
        return faults

    def _quantize_on_meta(
        self, wanted: Mapping[str, S], quantize: Callable[[torch.Tensor, S], torch.Tensor]
    ) -> Quantized:
        """What is written for the weights, on ``meta``; one tensor for all that are alike."""
        import torch

        made: dict[tuple[Any, ...], torch.Tensor] = {}
        shapes = {spec.name: spec.shape for spec in self._skeleton}
        written = {}
        for name, scheme in wanted.items():
            kind = (shapes[name], self._dtypes[name], id(scheme))
            if kind not in made:
                made[kind] = quantize(torch.empty(shapes[name], dtype=self._dtypes[name], device="meta"), scheme)
            written[name] = made[kind]
        return written

    @cached_property
    def _given(self) -> Found | None:
        """What the forward takes; looked for in float32 where no forward runs in the model's own dtypes.

        Raises:
            TookTooMuch: nobody waits so long for a plan.
        """
        from aoconvert.inputs import find_inputs
        from aoconvert.models.deadline import TookTooMuch, deadline
        from aoconvert.models.repeats import run_once

        for dtypes in (self._dtypes, _in_float32(self._dtypes)):
            try:
                with _quiet(), deadline(_SECONDS):
                    model, _ = self._build(dtypes, {}, values=False)
                    run_once(model)
                    return find_inputs(model, tries=_TRIES, seconds=_SEARCH)
            except TookTooMuch:
                raise
            except Exception:  # none found, or a class that fails in its own way
                continue
        return None

    def _attempt(self, given: Found, dtypes: Dtypes, quantized: Quantized, *, values: bool) -> Watch | Exception:
        """One forward of a fresh copy, or what it raised.

        Raises:
            TookTooMuch: nobody waits so long for a plan.
        """
        import torch

        from aoconvert.models.deadline import TookTooMuch, deadline
        from aoconvert.models.forward_watch import Watch
        from aoconvert.models.repeats import run_once, spread

        inputs = replace(given, dtype=_base_dtype(self._skeleton, dtypes)).make("cpu" if values else "meta")
        try:
            with _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
                model, weights = self._build(dtypes, quantized, values=values)
                names = run_once(model) if not values else {}
                watch = Watch(weights, values=values)
                with deadline(_SECONDS), watch:
                    model(**inputs)
        except TookTooMuch:
            raise
        except Exception as error:  # whatever a class raises
            return error
        watch.rows, watch.faults = spread(watch.rows, names), spread(watch.faults, names)
        return watch

    def _build(
        self, dtypes: Dtypes, quantized: Quantized, *, values: bool
    ) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
        """A copy with the tensors that a loaded model has, and the weights among them that are watched."""
        from torch import nn

        model = rebuild(self._skeleton, _base_dtype(self._skeleton, dtypes), buffers=values).eval()
        modules = dict(model.named_modules())
        made: dict[str, torch.Tensor] = {}
        for spec in self._skeleton:
            module, leaf = modules[spec.module], spec.name.rpartition(".")[2]
            if not spec.parameter:
                buffer = module._buffers[leaf]
                module._buffers[leaf] = None if buffer is None else buffer.to(dtypes[spec.name])
                continue
            name = spec.tied_to or spec.name
            if name not in made:
                tensor = quantized.get(name)
                if tensor is None:
                    tensor = _blank(spec.shape, dtypes[spec.name], real=values and spec.numel <= _SMALL)
                made[name] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[leaf] = made[name]
        if quantized:
            _mark_quantized(model)
        watched = {spec.name for spec in self._skeleton if spec.kind in ("linear", "embedding")}
        return model, {name: tensor for name, tensor in made.items() if name in watched}


_KEPT = 64
_trials: dict[str, Trial] = {}


def _blank(shape: tuple[int, ...], dtype: torch.dtype, *, real: bool) -> torch.Tensor:
    import torch

    return torch.zeros(shape, dtype=dtype) if real else torch.empty(shape, dtype=dtype, device="meta")


def _mark_quantized(model: Any) -> None:
    """As ``from_pretrained`` of both libraries does: some forwards go another way then."""
    from transformers import PreTrainedModel

    model.is_quantized = True
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def _enlarge(found: Found, factors: Sequence[int]) -> Iterator[Found]:
    """Larger inputs: in one dimension, the batch excepted, of all tensors that have that size or of one."""
    from aoconvert.inputs.blanks import replace_at, tensors

    places = [
        (path, dimension, size)
        for path, blank in tensors(found.state)
        for dimension, size in enumerate(blank.shape)
        if dimension and blank.kind != "given"
    ]
    shared = [[place for place in places if place[2] == size] for size in sorted({size for *_, size in places})]
    alone = [[place] for place in places if [place] not in shared]
    for factor, group in product(factors, (*shared, *alone)):
        state: Any = found.state
        for path, dimension, size in group:
            blank = dict(tensors(state))[path]
            shape = (*blank.shape[:dimension], factor * size, *blank.shape[dimension + 1 :])
            state = replace_at(state, path, replace(blank, shape=shape))
        yield replace(found, state=state)


def _in_float32(dtypes: Dtypes) -> Dtypes:
    import torch

    return {name: torch.float32 if dtype.is_floating_point else dtype for name, dtype in dtypes.items()}


def _base_dtype(skeleton: Skeleton, dtypes: Dtypes) -> torch.dtype:
    """The dtype of most parameters."""
    import torch

    counts: dict[torch.dtype, int] = {}
    for spec in skeleton:
        if spec.floating and spec.parameter:
            counts[dtypes[spec.name]] = counts.get(dtypes[spec.name], 0) + spec.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _kinds(skeleton: Skeleton, quantized: Quantized) -> list[Quantized]:
    """Weights that are at the same place of repeated blocks, with the same shape, together."""
    kinds: dict[Any, dict[str, torch.Tensor]] = {}
    for spec in skeleton:
        if spec.name in quantized:
            place = re.sub(r"\d+", "#", spec.name), spec.shape
            kinds.setdefault(place, {})[spec.name] = quantized[spec.name]
    return list(kinds.values())


def _cannot_run(skeleton: Skeleton, kind: Quantized, error: Exception) -> str:
    classes = sorted({type(tensor).__name__ for tensor in kind.values()})
    return f"{skeleton.component.class_name} cannot run with an {' or '.join(classes)} there ({type(error).__name__})"


@cache
def _versions() -> dict[str, Any]:
    """What runs the trial: versions, and this code itself."""
    here = Path(__file__).parent
    files = sorted((*here.glob("*.py"), *(here.parent / "inputs").glob("*.py")))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {**{name: version_of(name) for name in _PACKAGES}, "aoconvert": digest}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a model says of its input, or of kernels that are not installed, is for whoever runs it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), quiet_imports():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
