"""``pickle_tree`` nodes as JSON values, without loss, and back with every type checked.

Primitives stand for themselves. Everything else is a list that begins with its kind: ``["tuple", …]``, ``["list", …]``,
``["dict", [key, value], …]``, ``["global", module, name]``, ``["storage", global, key, numel]`` and
``["call", global, args, new, pairs, state]``.
"""

from __future__ import annotations

from typing import Any

from aoconvert.formats.torch_bin.pickle_tree import Call, Global, Items, Node, Pairs, Storage


def encode(node: Node) -> Any:
    """The node as values that ``json`` writes."""
    match node:
        case tuple():
            return ["tuple", *map(encode, node)]
        case Items(values):
            return ["list", *map(encode, values)]
        case Pairs(pairs):
            return ["dict", *_pairs(pairs)]
        case Global(module, name):
            return ["global", module, name]
        case Storage(kind, key, numel):
            return ["storage", encode(kind), key, numel]
        case Call(func, args, new, pairs, state):
            return ["call", encode(func), encode(args), new, _pairs(pairs), encode(state)]
        case _:
            return node


def _pairs(pairs: tuple[tuple[Node, Node], ...]) -> list[Any]:
    return [[encode(key), encode(value)] for key, value in pairs]


def decode(value: Any) -> Node:
    """The node that ``encode`` was given.

    Raises:
        ValueError: no such thing.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[no-any-return]
    match value:
        case ["tuple", *values]:
            return tuple(map(decode, values))
        case ["list", *values]:
            return Items(tuple(map(decode, values)))
        case ["dict", *pairs]:
            return Pairs(_decode_pairs(pairs))
        case ["global", str(module), str(name)] if _is_line(module) and _is_line(name):
            return Global(module, name)
        case ["storage", kind, str(key), numel] if type(numel) is int and numel >= 0:
            return Storage(_decode_global(kind), key, numel)
        case ["call", func, args, bool(new), list(pairs), state]:
            arguments = decode(args)
            if isinstance(arguments, tuple):
                return Call(_decode_global(func), arguments, new, _decode_pairs(pairs), decode(state))
    raise ValueError("not a node")


def _is_line(text: str) -> bool:
    """A name that the pickle's GLOBAL opcode, which ends at a line break, can hold."""
    return bool(text) and "\n" not in text


def _decode_global(value: Any) -> Global:
    found = decode(value)
    if not isinstance(found, Global):
        raise ValueError("not a global")
    return found


def _decode_pairs(values: list[Any]) -> tuple[tuple[Node, Node], ...]:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in values):
        raise ValueError("not pairs")
    return tuple((decode(key), decode(value)) for key, value in values)
