"""Which torchao can load a checkpoint, and which wrote it.

Three sources, from the widest to the narrowest: where every name in the pickle was in which release (measured, see
``release_names``); what a class kept of itself in which release, and what loads but computes something else (both in
:mod:`aoconvert.schemes.tensor_classes`). Nothing here imports torch or torchao.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packaging.version import Version

from aoconvert.formats.torch_bin.contents import BinTensor, Instance
from aoconvert.inspection.release_names import RELEASES, TABLE
from aoconvert.inspection.types import Loading
from aoconvert.schemes.tensor_classes import PackedLayout, class_named

Range = tuple[int, int]
"""Places in ``RELEASES``, both included."""

ALL: Range = (0, len(RELEASES) - 1)
_NOWHERE: Range = (len(RELEASES), -1)


@dataclass(frozen=True)
class ReleaseSupport:
    """The columns of ``release_names.TABLE``; ``None`` is never."""

    present: Range | None
    written: Range | None
    registered: Range | None
    imported: Range | None


@functools.cache
def fates() -> Mapping[str, ReleaseSupport]:
    """``release_names.TABLE`` by dotted name."""
    found: dict[str, ReleaseSupport] = {}
    module = ""
    for line in TABLE.strip("\n").splitlines():
        if not line.startswith(" "):
            module = line
            continue
        present, written, registered, imported, *names = line.split()
        fate = ReleaseSupport(_range(present), _range(written), _range(registered), _range(imported))
        found |= {f"{module}.{name}": fate for name in names}
    return found


def find_loading(names: Iterable[str], tensors: Iterable[BinTensor]) -> Loading:
    """Which torchao loads a ``.bin`` and computes the right values.

    Args:
        names: the dotted names in its pickle.
        tensors: its tensors of torchao classes.
    """
    ours = sorted(name for name in set(names) if name.startswith("torchao."))
    low, high = ALL
    limits = [(name, _find_present(name)) for name in ours]
    limits += [limit for tensor in tensors for limit in _limits(tensor)]
    first: dict[int, str] = {}
    last: dict[int, str] = {}
    for reason, (begin, end) in limits:
        first.setdefault(begin, reason)
        last.setdefault(end, reason)
        low, high = max(low, begin), min(high, end)
    unheard = [name for name in ours if _find_present(name) == _NOWHERE]
    if unheard:
        why = [f"{name} is not in any torchao release that aoconvert knows" for name in unheard]
        return Loading(None, None, tuple(why), possible=False)
    why = []
    if low > ALL[0]:
        why.append(_sentence(first[low], f"is not in torchao before {short(low)}"))
    if high < ALL[1]:
        why.append(_sentence(last[high], f"is not in torchao {short(high + 1)} or later"))
    if low > high:
        return Loading(None, None, tuple(why), possible=False)
    best, (allowed, imports) = _easiest(set(names), low, high)
    return Loading(
        short(low), None if high == ALL[1] else short(high), tuple(why), RELEASES[best], tuple(imports), tuple(allowed)
    )


def _easiest(names: set[str], low: int, high: int) -> tuple[int, tuple[list[str], list[str]]]:
    """The release that asks for the least before loading, the newest of them: names to allow, modules to import."""

    def asks(place: int) -> tuple[list[str], list[str]]:
        found = [(name, fates()[name]) for name in sorted(names) if name in fates()]
        missing = [(name, fate) for name, fate in found if not _covers(fate.registered, place)]
        imports = sorted({name.rpartition(".")[0] for name, fate in missing if _covers(fate.imported, place)})
        allowed = [name for name, fate in missing if not _covers(fate.imported, place)]
        return allowed + sorted(names & {"functools.partial"}), imports

    places = range(low, high + 1)
    best = min(places, key=lambda place: (*(len(part) for part in asks(place)), -place))
    return best, asks(best)


def find_loading_safetensors(classes: Iterable[str]) -> Loading:
    """Which torchao loads torchao's own safetensors with these classes (last components)."""
    first = 0
    why: list[str] = []
    for name in sorted(set(classes)):
        since = class_named(name).safetensors_since
        if since is None:
            return Loading(
                None,
                None,
                (f"{name} is not in the safetensors format of any torchao release that aoconvert knows",),
                possible=False,
            )
        if RELEASES.index(since) > first:
            first = RELEASES.index(since)
            why = [f"torchao's safetensors format supports {name} since {short(first)}"]
    return Loading(short(first), None, tuple(why))


def find_written(names: Iterable[str], tensors: Iterable[BinTensor]) -> Range | None:
    """The releases that can have written such a pickle; ``None`` where none can (or no torchao name is in it)."""
    ours = [name for name in names if name.startswith("torchao.")]
    low, high = ALL
    for name in ours:
        span = fates()[name].written if name in fates() else None
        low, high = max(low, (span or ALL)[0]), min(high, (span or ALL)[1])
    for tensor in tensors:
        for part in parts(tensor):
            span = _signature(part)
            low, high = max(low, (span or ALL)[0]), min(high, (span or ALL)[1])
    return (low, high) if ours and low <= high else None


def parts(tensor: BinTensor) -> Iterable[BinTensor]:
    """The tensor and the torchao tensors within it, outermost first."""
    if tensor.class_name.startswith("torchao."):
        yield tensor
        for inner in tensor.inner.values():
            yield from parts(inner)


def layout_of_classes(classes: Iterable[str]) -> PackedLayout | None:
    """The first layout that only one device can use, by the last components of class names."""
    return next((layout for name in sorted(classes) if (layout := class_named(name).layout) is not None), None)


def short(place: int) -> str:
    """A release as people write it: ``0.17`` for every patch release of 0.17, ``0.14.1`` where it began there."""
    return RELEASES[place].removesuffix(".0")


def fits(version: str, span: Loading) -> bool | None:
    """Whether an installed torchao is inside the range; ``None`` when it is newer than all that is known here."""
    installed = Version(version)
    if not span.possible:
        return False
    if span.minimum is not None and Version(installed.base_version) < Version(span.minimum):
        return False
    if span.maximum is not None:
        return installed.release[:2] <= Version(span.maximum).release[:2]
    return None if installed.release[:2] > Version(RELEASES[-1]).release[:2] else True


def _range(text: str) -> Range | None:
    if text == "-":
        return None
    first, _, last = text.partition(":")
    return RELEASES.index(first), RELEASES.index(last)


def _find_present(name: str) -> Range:
    fate = fates().get(name)
    return (fate.present if fate is not None else None) or _NOWHERE


def _covers(span: Range | None, place: int) -> bool:
    return span is not None and span[0] <= place <= span[1]


def _sentence(reason: str, outcome: str) -> str:
    """A reason that is a name needs a verb; one that is a sentence does not."""
    return reason if " " in reason else f"{reason} {outcome}"


def _signature(tensor: BinTensor) -> Range | None:
    """The releases whose class holds exactly what this tensor holds; ``None`` where that is not known."""
    held = (set(tensor.inner) | set(tensor.attributes)) - {"dtype", "shape"}
    known = class_named(tensor.class_name).fields
    spans = [
        (RELEASES.index(first), RELEASES.index(last)) for first, last, names in known if set(names.split()) == held
    ]
    return spans[0] if spans else None


def _limits(tensor: BinTensor) -> Iterable[tuple[str, Range]]:
    """What a tensor's own fields demand, beyond its class being there."""
    for part in parts(tensor):
        known = class_named(part.class_name)
        if known.strict and (span := _signature(part)) is not None:
            yield f"the fields of {known.name} were named so only in torchao {short(span[0])} to {short(span[1])}", span
        if (since := known.groups_since) is not None and (what := _grouped_or_asymmetric(part)):
            span = (RELEASES.index(f"{since}.0"), ALL[1])
            yield f"an {known.name} with {what} is computed rightly since torchao {since}", span
        if (until := known.row_scales_until) is not None and _row_scale(part):
            span = (0, RELEASES.index(until))
            later = short(span[1] + 1)
            yield f"{known.name} with one scale a row loads in torchao {later} and later, but not its values", span


def _grouped_or_asymmetric(tensor: BinTensor) -> str | None:
    block = tensor.attributes.get("block_size")
    kwargs = tensor.attributes.get("act_quant_kwargs")
    if (
        isinstance(block, tuple)
        and block
        and len(block) == len(tensor.shape)
        and block[-1] not in (tensor.shape[-1], -1)
    ):
        return "a scale a group"
    if isinstance(kwargs, Instance):
        mapping = kwargs.state.get("mapping_type")
        if isinstance(mapping, Instance) and mapping.args == (3,):  # MappingType.ASYMMETRIC
            return "asymmetric activations"
    return None


def _row_scale(tensor: BinTensor) -> bool:
    """Whether the scales have one dimension."""
    scale = tensor.inner.get("scale")
    return scale is not None and len(scale.shape) == 1
