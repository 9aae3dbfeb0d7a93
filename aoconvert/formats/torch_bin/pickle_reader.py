"""Reads a pickle without executing anything and without importing what it names.

Every opcode of protocols 0 to 5 is known (``pickletools`` documents them). What a name, a call or a persistent id means
is asked of ``Actions``, which refuses all it does not know. Opcodes that ``torch.save`` never writes are refused, with
the name they carry. Work and memory are bounded by the limits here, whatever the bytes are.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TypeAlias

from aoconvert.formats.torch_bin.pickle_vm import Actions, Machine, Members, PickledItems, PickledPairs, refuse, show

MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 2_000_000  # a torchao tensor takes about 80
MAX_MARKS = 200  # marks open at once
MAX_INT_BYTES = 32
MAX_KEY = 1 << 31

Handler: TypeAlias = Callable[[Machine], None]

_STOP = ord(".")
_NESTED = re.compile(rb"\x80[\x00-\x05]|\(*[ci][\w.]+\n[\w.]+\n")
_INT_TEXT = re.compile(rb"[+-]?[0-9]{1,80}L?")


def read_pickle(data: bytes, actions: Actions) -> tuple[object, int]:
    """Read to STOP, which must be the last byte and leave one value.

    Returns:
        The value, of primitives, tuples, ``Items``, ``Pairs``, ``Members`` and what ``actions`` gave; the protocol.

    Raises:
        UnsafePickleError: damaged, too large, or refused, here or by ``actions``.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise refuse(None, f"{len(data):,} bytes, at most {MAX_PICKLE_BYTES:,} are accepted")
    value, protocol, end = read_first_pickle(data, actions)
    if end != len(data):
        raise refuse(end, f"{len(data) - end:,} bytes after the STOP opcode")
    return value, protocol


def read_first_pickle(data: bytes, actions: Actions) -> tuple[object, int, int]:
    """Read to the first STOP, whatever follows it.

    Returns:
        The value and the protocol, as ``read_pickle``; the bytes up to and with STOP.

    Raises:
        UnsafePickleError: as ``read_pickle``.
    """
    m = Machine(data, actions)
    for _ in range(MAX_OPCODES):
        m.start = start = m.position
        if start >= len(data):
            raise refuse(start, "ends without a STOP opcode")
        opcode = data[start]
        m.position = start + 1
        if opcode == _STOP:
            return _stop(m), m.protocol, m.position
        handler = _HANDLERS.get(opcode)
        if handler is None:
            raise refuse(start, f"no pickle opcode has the code {opcode:#04x}")
        handler(m)
    raise refuse(m.position, f"more than {MAX_OPCODES:,} opcodes")


def _stop(m: Machine) -> object:
    if m.marks or len(m.stack) != 1:
        raise refuse(m.start, "values are left over at the STOP opcode")
    return m.stack[0]


def _protocol(m: Machine) -> None:
    version = m.take(1)[0]
    if m.start or version > 5:
        raise refuse(m.start, f"protocol {version} announced in the middle" if m.start else f"protocol {version}")
    m.protocol = version


def _frame(m: Machine) -> None:
    size = int.from_bytes(m.take(8), "little")
    if size > len(m.data) - m.position:
        raise refuse(m.start, f"a frame of {size:,} bytes, {len(m.data) - m.position:,} are left")


def _mark(m: Machine) -> None:
    if len(m.marks) >= MAX_MARKS:
        raise refuse(m.start, f"more than {MAX_MARKS} values nested in each other")
    m.marks.append(m.stack)
    m.stack = []


def _value(value: object) -> Handler:
    return lambda m: m.stack.append(value)


def _read_fixed(format_: str) -> Handler:
    layout = struct.Struct(format_)

    def handler(m: Machine) -> None:
        m.stack.append(layout.unpack(m.take(layout.size))[0])

    return handler


def _read_sized(width: int, make: Callable[[Machine, bytes], object]) -> Handler:
    def handler(m: Machine) -> None:
        m.push(make(m, m.take(int.from_bytes(m.take(width), "little"))))

    return handler


def _long(m: Machine, raw: bytes) -> int:
    if len(raw) > MAX_INT_BYTES:
        raise refuse(m.start, f"an integer of {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _bytes(m: Machine, raw: bytes) -> bytes:
    if _NESTED.match(raw):
        raise refuse(m.start, "a pickle nested in bytes")
    return raw


def _int_line(m: Machine) -> None:
    line = m.line()
    if line in (b"00", b"01"):
        m.push(line == b"01")
    elif _INT_TEXT.fullmatch(line):
        m.push(int(line.rstrip(b"L")))
    else:
        raise refuse(m.start, "an invalid integer")


def _float_line(m: Machine) -> None:
    line = m.line()
    try:
        m.push(float(line))
    except ValueError as error:
        raise refuse(m.start, "an invalid number") from error


def _string_line(m: Machine) -> None:
    line = m.line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"') or b"\\" in line:
        raise refuse(m.start, "a string that torch.save never writes")
    m.push(m.text(line[1:-1], "ascii"))


def _append(m: Machine) -> None:
    _extend(m, [m.pop()])


def _extend(m: Machine, values: list[object]) -> None:
    target = m.top()
    if not isinstance(target, PickledItems) or target.sealed:
        raise refuse(m.start, "items are appended to something that is not a list, or is in use")
    target.values.extend(values)


def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    _set_items(m, [key, value])


def _set_items(m: Machine, values: list[object]) -> None:
    target = m.top()
    if not isinstance(target, PickledPairs) or target.sealed:
        raise refuse(m.start, "items are set on something that is not a dict, or is in use")
    _fill(m, target, values)


def _fill(m: Machine, target: PickledPairs, values: list[object]) -> None:
    if len(values) % 2:
        raise refuse(m.start, "a key without a value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) is not str and not (type(key) is int and -MAX_KEY <= key < MAX_KEY):
            raise refuse(m.start, "a dict key that is not a string or a small integer")
        if key in target.values:
            raise refuse(m.start, f"the key '{show(str(key))}' occurs twice")
        target.values[key] = value


def _add_items(m: Machine) -> None:
    values, target = m.to_mark(), m.top()
    if not isinstance(target, Members) or target.sealed:
        raise refuse(m.start, "items are added to something that is not a set, or is in use")
    target.values.extend(values)


def _list(m: Machine) -> None:
    made = PickledItems()
    made.values = m.to_mark()
    m.contain(made)


def _dict(m: Machine) -> None:
    made, values = PickledPairs(), m.to_mark()
    _fill(m, made, values)
    m.contain(made)


def _frozenset(m: Machine) -> None:
    made = Members()
    made.values = m.to_mark()
    m.contain(made)


def _global_line(m: Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    m.push(m.actions.name(module, name, m.start))


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(module, str) or not isinstance(name, str):
        raise refuse(m.start, "a name is built from something that is not a string")
    m.push(m.actions.name(module, name, m.start))


def _reduce(m: Machine) -> None:
    args, func = m.pop(), m.pop()
    if not isinstance(args, tuple):
        raise refuse(m.start, "a call without a tuple of arguments")
    m.push(m.actions.call(func, args, m.start))


def _newobj(m: Machine) -> None:
    args, cls = m.pop(), m.pop()
    if not isinstance(args, tuple):
        raise refuse(m.start, "an object is made without a tuple of arguments")
    m.push(m.actions.new(cls, args, m.start))


def _build(m: Machine) -> None:
    state = m.pop()
    m.actions.build(m.top(), state, m.start)


def _persistent(m: Machine) -> None:
    m.push(m.actions.persistent(m.pop(), m.start))


def _inst(m: Machine) -> None:
    dotted = f"{m.text(m.line())}.{m.text(m.line())}"
    raise refuse(m.start, f"INST {show(dotted)}: an opcode that torch.save never writes")


def _refuse(name: str) -> Handler:
    def handler(m: Machine) -> None:
        raise refuse(m.start, f"{name}: an opcode that torch.save never writes")

    return handler


def _utf8(m: Machine, raw: bytes) -> str:
    return m.text(raw)


def _ascii(m: Machine, raw: bytes) -> str:
    return m.text(raw, "ascii")


_HANDLERS: dict[int, Handler] = {
    ord(code): handler
    for code, handler in {
        b"\x80": _protocol,
        b"\x95": _frame,
        b"(": _mark,
        b"N": _value(None),
        b"\x88": _value(True),
        b"\x89": _value(False),
        b"I": _int_line,
        b"L": _int_line,
        b"J": _read_fixed("<i"),
        b"K": _read_fixed("<B"),
        b"M": _read_fixed("<H"),
        b"G": _read_fixed(">d"),
        b"F": _float_line,
        b"\x8a": _read_sized(1, _long),
        b"\x8b": _read_sized(4, _long),
        b"S": _string_line,
        b"T": _read_sized(4, _ascii),
        b"U": _read_sized(1, _ascii),
        b"V": lambda m: m.push(m.text(m.line(), "raw-unicode-escape")),
        b"\x8c": _read_sized(1, _utf8),
        b"X": _read_sized(4, _utf8),
        b"\x8d": _read_sized(8, _utf8),
        b"B": _read_sized(4, _bytes),
        b"C": _read_sized(1, _bytes),
        b"\x8e": _read_sized(8, _bytes),
        b"\x96": _read_sized(8, _bytes),
        b")": _value(()),
        b"t": lambda m: m.push(tuple(m.to_mark())),
        b"\x85": lambda m: m.tuple(1),
        b"\x86": lambda m: m.tuple(2),
        b"\x87": lambda m: m.tuple(3),
        b"]": lambda m: m.contain(PickledItems()),
        b"l": _list,
        b"a": _append,
        b"e": lambda m: _extend(m, m.to_mark()),
        b"}": lambda m: m.contain(PickledPairs()),
        b"d": _dict,
        b"s": _set_item,
        b"u": lambda m: _set_items(m, m.to_mark()),
        b"\x8f": lambda m: m.contain(Members()),
        b"\x90": _add_items,
        b"\x91": _frozenset,
        b"p": lambda m: m.put(_memo_index(m)),
        b"q": lambda m: m.put(m.take(1)[0]),
        b"r": lambda m: m.put(int.from_bytes(m.take(4), "little")),
        b"\x94": lambda m: m.put(len(m.memo)),
        b"g": lambda m: m.get(_memo_index(m)),
        b"h": lambda m: m.get(m.take(1)[0]),
        b"j": lambda m: m.get(int.from_bytes(m.take(4), "little")),
        b"c": _global_line,
        b"\x93": _stack_global,
        b"R": _reduce,
        b"\x81": _newobj,
        b"b": _build,
        b"Q": _persistent,
        b"i": _inst,
        b"o": _refuse("OBJ"),
        b"\x92": _refuse("NEWOBJ_EX"),
        b"P": _refuse("PERSID"),
        b"\x82": _refuse("EXT1"),
        b"\x83": _refuse("EXT2"),
        b"\x84": _refuse("EXT4"),
        b"0": _refuse("POP"),
        b"1": _refuse("POP_MARK"),
        b"2": _refuse("DUP"),
        b"\x97": _refuse("NEXT_BUFFER"),
        b"\x98": _refuse("READONLY_BUFFER"),
    }.items()
}


def _memo_index(m: Machine) -> int:
    line = m.line()
    if not (line.isdigit() and len(line) <= 10):
        raise refuse(m.start, "an invalid memo index")
    return int(line)
