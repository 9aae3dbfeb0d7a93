"""The torchao config that says what was decided, for ``config.json`` and the manifest.

torchao's documentation and its code differ in what a pattern of an ``FqnToConfig`` means (0.18,
``quant_api._fqn_to_config_handler``): a regular expression that matches a bias or a norm quantizes it, one that matches
a module without a weight fails, two that match one tensor are both applied, ``_default`` warns at every load that it
will go. So nothing of a recipe is taken over as it stands. The names of what was quantized are folded into patterns
that match them and can match nothing else; what is left alone is matched by none.

Linear layers are named as modules, as torchao and vLLM have it; a parameter that is no module's ``weight`` (stacked
experts) by its own name.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from aoconvert.environment import import_torchao
from aoconvert.recipes.rules import Rules

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

    from aoconvert.schemes import Scheme

_WEIGHT = ".weight"


def fqn_to_config(rules: Rules, decided: Mapping[str, Scheme | None], linear: Collection[str]) -> AOBaseConfig:
    """The torchao config to record.

    Args:
        rules: what the decisions were made by.
        decided: state-dict key -> its scheme, ``None`` where it is left alone.
        linear: those that are the weight of a linear layer.

    Returns:
        A plain config where the default went to linear layers and nothing else was quantized; it is for all linear
        layers but those in ``modules_to_not_convert``. Otherwise an ``FqnToConfig`` that is exact on its own:
        ``quantize_(model, config, filter_fn=None)`` quantizes the same tensors to the same.
    """
    import_torchao()
    from torchao.quantization import FqnToConfig

    quantized = {name: scheme for name, scheme in decided.items() if scheme is not None}
    default = rules.default
    if default is not None and all(scheme.key == default.key and name in linear for name, scheme in quantized.items()):
        return default.config
    groups: dict[str, list[str]] = {}
    schemes = {scheme.key: scheme for scheme in quantized.values()}
    for name, scheme in quantized.items():
        groups.setdefault(scheme.key, []).append(name.removesuffix(_WEIGHT))
    entries = [(pattern, schemes[key].config) for key, names in groups.items() for pattern in fold(names)]
    return FqnToConfig(OrderedDict(entries))


def fold(names: Iterable[str]) -> Iterator[str]:
    """Few patterns in ``FqnToConfig``'s syntax that together match these names and nothing else.

    Names inside modules that differ only in numbers and in their last part become one regular expression.
    """
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in names:
        parts = name.split(".")
        free = [part.isdecimal() or 0 < index == len(parts) - 1 for index, part in enumerate(parts)]
        frame = tuple("" if open_ else part for part, open_ in zip(parts, free, strict=True))
        groups.setdefault(frame, []).append(tuple(part for part, open_ in zip(parts, free, strict=True) if open_))
    for frame, rows in groups.items():
        forwards = _boxes(rows)
        backwards = [box[::-1] for box in _boxes([row[::-1] for row in rows])]
        for box in forwards if len(forwards) <= len(backwards) else backwards:
            yield _pattern(frame, box)


def _boxes(rows: Sequence[tuple[str, ...]]) -> list[list[list[str]]]:
    """Products of alternatives, one list a position, that hold each row once and no other."""
    if not rows[0]:
        return [[]]
    tails: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in rows:
        tails.setdefault(first, []).append(tuple(rest))
    merged: dict[frozenset[tuple[str, ...]], list[str]] = {}
    for first, rest_rows in tails.items():
        merged.setdefault(frozenset(rest_rows), []).append(first)
    return [[firsts, *box] for firsts in merged.values() for box in _boxes(tails[firsts[0]])]


def _pattern(frame: Sequence[str], box: Sequence[Sequence[str]]) -> str:
    alternatives = iter(box)
    parts = [[part] if part else list(next(alternatives)) for part in frame]
    if all(len(part) == 1 for part in parts):
        return ".".join(part[0] for part in parts)
    escaped = ([re.escape(value) for value in part] for part in parts)
    return "re:" + r"\.".join(part[0] if len(part) == 1 else f"(?:{'|'.join(part)})" for part in escaped)
