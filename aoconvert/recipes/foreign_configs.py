"""Whether a ``quantization_config`` by somebody else may be given to a library: looked at before one sees it.

torchao makes an object of whatever class ``_type`` names in its modules, with whatever arguments; the libraries match
patterns from it against every name of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from aoconvert.formats.torch_bin.safe_names import ITEMSIZE, Kind, list_names

_CONFIGS = re.compile(r"\w*Weight(?:Only)?Config|(?:Module)?FqnToConfig")
# what their fields hold, beside what pickles may hold: granularities, packing formats, choices
_VALUES = frozenset(
    (
        *("PerAxis", "PerBlock", "PerGroup", "PerRow", "PerTensor", "PerToken", "Float8MMConfig", "KernelPreference"),
        *("Float8PackingFormat", "Int4PackingFormat", "IntxPackingFormat", "MappingType", "ScaleCalculationMode"),
        *("Int4ChooseQParamsAlgorithm", "IntxChooseQParamsAlgorithm", "PlainLayout"),
    )
)
_LONGEST = 10_000  # characters of a pattern
_MOST = 4  # repetitions in one, of which each may give back what it took

_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[^)]{0,3}|\{\d*,?\d*\}|.", re.DOTALL)


def check_quantization(values: Mapping[str, Any]) -> None:
    """Look at a ``quantization_config``, at any depth.

    Raises:
        ValueError: what is wrong with it.
    """
    for name, data in _types(values):
        if name == "torch.dtype":
            if data not in ITEMSIZE:
                raise ValueError(f"it names the dtype {data!r}, which torch does not have")
        elif not (_CONFIGS.fullmatch(name) or name in _known_values()):
            raise ValueError(f"it names {name!r}, which is not part of a torchao config")
    for pattern in _patterns(values):
        if is_costly(pattern):
            raise ValueError(f"matching its pattern {pattern[:100]!r} could take forever")


@cache
def _known_values() -> frozenset[str]:
    plain = (Kind.DATA, Kind.TUPLE, Kind.ENUM)
    return _VALUES | {name.rpartition(".")[2] for name, known in list_names().items() if known.kind in plain}


def _types(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if "_type" in value:
            yield str(value["_type"]), value.get("_data")
        for inner in value.values():
            yield from _types(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _types(inner)


def _patterns(values: Any) -> Iterator[str]:
    """Regular expressions: keys that begin with ``re:``, and every module that is not to be converted."""
    if isinstance(values, Mapping):
        for key, inner in values.items():
            if isinstance(key, str) and key.startswith("re:"):
                yield key[3:]
            if key == "modules_to_not_convert" and isinstance(inner, list):
                yield from (name for name in inner if isinstance(name, str))
            yield from _patterns(inner)
    elif isinstance(values, list):
        for inner in values:
            yield from _patterns(inner)


def is_costly(pattern: str) -> bool:
    """Whether matching could take more than a time in proportion to a small power of a name's length.

    A repetition of what repeats itself or has alternatives, or many repetitions one after the other.
    """
    if len(pattern) > _LONGEST:
        return True
    loose = [False]  # for each open group: whether it could match the same text in several ways
    last, count = False, 0
    for atom in _ATOM.findall(pattern):
        if atom.startswith("("):
            loose.append(False)
            last = False
        elif atom == ")" and len(loose) > 1:
            last = loose.pop()
            loose[-1] |= last
        elif atom == "|":
            loose[-1] = len(loose) > 1 or loose[-1]
        elif atom in "*+" or (len(atom) > 1 and atom[0] == "{"):
            if last:
                return True
            count += 1
            loose[-1] |= len(loose) > 1
        elif atom != "?":
            last = False
    return count > _MOST
