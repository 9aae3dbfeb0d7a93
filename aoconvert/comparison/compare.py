"""``aoconvert diff``: headers first, then codes and scales, then how far the values are from each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from aoconvert.comparison.opening import Side, SidePart, open_side
from aoconvert.comparison.originals import as_named
from aoconvert.comparison.quanto import put_together
from aoconvert.comparison.reading import OpenFiles
from aoconvert.comparison.tensors import Leaf, StoredTensor, is_codes
from aoconvert.comparison.today import as_today, is_old
from aoconvert.comparison.types import Comparison, Difference, What
from aoconvert.comparison.values import NoValues, measure
from aoconvert.engine.memory import steady_allocator
from aoconvert.errors import SourceError
from aoconvert.options import DEFAULT_HUB, HubOptions
from aoconvert.progress import Progress, Silent

Pair = tuple[StoredTensor, StoredTensor]


def compare(a: str, b: str, hub: HubOptions = DEFAULT_HUB, progress: Progress | None = None) -> Comparison:
    """Say what differs between two checkpoints, or between a checkpoint and its source.

    No pickle is executed. Memory does not grow with the files: weights are read and compared some rows at a time.

    Args:
        a, b: a folder, one weights file, or a Hub repo each.
        hub: how to ask for a Hub repo.
        progress: is told what happens.

    Raises:
        SourceError: nothing there, files that cannot be compared, or a model and a pipeline without such a part.
        UnsafeFileError: a pickle that must not be loaded.
        HubError: the Hub refused or could not be reached.
        ReadError: the disk fails, or a file changed.
    """
    progress = progress or Silent()
    steady_allocator()
    sides = open_side(a, hub, progress), open_side(b, hub, progress)
    pairs, left_out = _pair(*sides)
    with OpenFiles() as files:
        comparing = _Comparing(files, progress)
        progress.start("compare", sum(_shared_bytes(*pair) for pair in pairs.values()))
        for name, (first, second) in pairs.items():
            with (
                as_named(sides[1], second, sides[0], first, hub) as one,
                as_named(sides[0], first, sides[1], second, hub) as other,
            ):
                prefix = f"{name}/" if name else ""
                comparing.add(prefix, put_together(one, other), put_together(other, one))
        progress.finish()
    return Comparison(
        comparing.same,
        tuple(sorted(comparing.different, key=lambda item: (item.rank, item.name))),
        tuple(comparing.only_a),
        tuple(comparing.only_b),
        tuple(comparing.tied),
        left_out,
    )


_NOTHING = SidePart(None, {})


def _pair(a: Side, b: Side) -> tuple[dict[str, tuple[SidePart, SidePart]], tuple[str, ...]]:
    """The parts to compare by name, and those of a pipeline that one model has nothing for.

    Raises:
        SourceError: no part of the pipeline is such a model.
    """
    if (a.single is None) == (b.single is None):
        names = list(dict.fromkeys([*a.parts, *b.parts]))
        return {name: (a.parts.get(name, _NOTHING), b.parts.get(name, _NOTHING)) for name in names}, ()
    model, pipeline = (a, b) if a.single is not None else (b, a)
    assert model.single is not None
    wanted = model.single.class_name
    found = [name for name, part in pipeline.parts.items() if wanted is not None and part.class_name == wanted]
    if len(found) != 1:
        what = f"has {len(found)} models of the class {wanted}" if found else f"has no {wanted or 'such model'}"
        raise SourceError(
            f"{model.label} is one model, but {pipeline.label} is a pipeline that {what}",
            hint="give the folder of the part to compare with",
        )
    part = pipeline.parts[found[0]]
    pair = (model.single, part) if model is a else (part, model.single)
    return {"": pair}, tuple(name for name in pipeline.parts if name != found[0])


def _shared_bytes(a: SidePart, b: SidePart) -> int:
    return sum(tensor.nbytes for name, tensor in a.tensors.items() if name in b.tensors)


@dataclass
class _Comparing:
    """Takes in one part after the other."""

    files: OpenFiles
    progress: Progress
    same: int = 0
    different: list[Difference] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)

    def add(self, prefix: str, a: SidePart, b: SidePart) -> None:
        """Compare the tensors of one part, in the order of their files."""
        both = [name for name in a.tensors if name in b.tensors]
        for name in both:
            found = self._compare(prefix + name, (a.tensors[name], b.tensors[name]), (a.packing, b.packing))
            if found is None:
                self.same += 1
            else:
                self.different.append(found)
            self.progress.advance(a.tensors[name].nbytes, name)
        self._add_missing(prefix, a.tensors, set(both), self.only_a)
        self._add_missing(prefix, b.tensors, set(both), self.only_b)
        self.only_a += [prefix + name for name in a.dropped]
        self.only_b += [prefix + name for name in b.dropped]

    def _add_missing(self, prefix: str, tensors: Mapping[str, StoredTensor], both: set[str], only: list[str]) -> None:
        """Names that one side has; those whose very bytes have a name on both sides are tied to it."""
        shared = {_place(tensors[name]) for name in both if tensors[name].nbytes}
        for name, tensor in tensors.items():
            if name not in both:
                (self.tied if _place(tensor) in shared else only).append(prefix + name)

    def _compare(self, name: str, pair: Pair, packings: tuple[str | None, str | None]) -> Difference | None:
        a, b = pair
        if a.shape != b.shape:
            return Difference(name, "shape", None, f"{list(a.shape)} and {list(b.shape)}", comparable=False)
        found = _differences(self.files, a, b)
        if found and (is_old(a) or is_old(b)):
            a, b = as_today(self.files, a), as_today(self.files, b)
            found = _differences(self.files, a, b)
        if not found:
            return None
        what, detail = found[0][0], "; ".join(text for _, text in found)
        try:
            stats = measure(self.files, a, b, packings)
        except NoValues as reason:
            return Difference(name, what, None, f"{detail}; {reason}", comparable=False)
        if not stats.finite:
            return Difference(name, what, None, f"{detail}; not all values are finite", comparable=False)
        if stats.noise == 0:
            return Difference(name, what, None, f"{detail}; the values are the same numbers")
        return Difference(name, what, stats.sqnr_db, detail, comparable=stats.sqnr_db is not None)


# another class is found alone; other settings of the same class say less than other numbers
_ORDER: tuple[What, ...] = ("dtype", "codes", "scales", "values", "class")


# torchao 0.17 and later keep one that is 0 all over, earlier ones kept none
_ZERO_POINT = "zero_point"


def _place(tensor: StoredTensor) -> object:
    """Which bytes it stands for."""
    return tensor.class_name, tensor.dtype, tensor.shape, tuple(tensor.leaves.items())


def _differences(files: OpenFiles, a: StoredTensor, b: StoredTensor) -> list[tuple[What, str]]:
    """What differs in two tensors of one shape, and how, in words; what says most comes first."""
    return sorted(_find_differences(files, a, b), key=lambda item: _ORDER.index(item[0]))


def _find_differences(files: OpenFiles, a: StoredTensor, b: StoredTensor) -> Iterator[tuple[What, str]]:
    if a.kind != b.kind:
        yield "class", f"{_title(a)} and {_title(b)}"
        return
    if a.dtype != b.dtype:
        yield "dtype", f"{a.dtype} and {b.dtype}"
        if a.is_plain:
            return
    for name in dict.fromkeys([*a.leaves, *b.leaves]):
        what: What = "values" if a.is_plain else "codes" if is_codes(name) else "scales"
        if (text := _compare_leaves(files, name, a.leaves.get(name), b.leaves.get(name))) is not None:
            yield what, text
    for name in sorted(a.settings.keys() | b.settings.keys()):
        if a.settings.get(name) != b.settings.get(name):
            yield "class", f"other {name}"


def _title(tensor: StoredTensor) -> str:
    return tensor.dtype if tensor.is_plain else tensor.kind


def _compare_leaves(files: OpenFiles, name: str, a: Leaf | None, b: Leaf | None) -> str | None:
    title = name or "values"
    if a is None or b is None:
        only = a or b
        if name == _ZERO_POINT and only is not None and files.is_zero(only):
            return None
        return f"{title} only in {'A' if b is None else 'B'}"
    if a.dtype != b.dtype:
        return f"{title} in {a.dtype} and {b.dtype}"
    if a.shape != b.shape:
        return f"{title} of shape {list(a.shape)} and {list(b.shape)}"
    count = files.count_different(a, b)
    return f"{count:,} of {math.prod(a.shape):,} {title}" if count else None
