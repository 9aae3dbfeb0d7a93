"""JSON from outside: what Python writes is read, what nobody writes is refused in a few words."""

import json
import math
import tracemalloc

import pytest

from aoconvert import json_text
from aoconvert.json_text import JsonStream, parse_json


@pytest.mark.parametrize(
    "value",
    [{}, [], None, 1.5, "text", {"a": [1, {"b": None}]}, {"model_max_length": 10**30}, {"a": "\x1b[31m\u202e"}],
)
def test_what_python_writes(value):
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def walk(stream, depth=2):
    """What comes next, objects and lists piece by piece down to this depth."""
    if depth and stream.peek() == "{":
        return {key: walk(stream, depth - 1) for key in stream.members()}
    if depth and stream.peek() == "[":
        return [walk(stream, depth - 1) for _ in stream.items()]
    return stream.value()


@pytest.mark.parametrize("window", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_piece_by_piece_it_is_the_same(window, indent, monkeypatch):
    monkeypatch.setattr(json_text, "_WINDOW", window)
    value = {
        "a": [],
        "b": {},
        "c": [{"k\n": -1.5e-7, "é": [True, None, '\\"😀']}, 12345, []],
        "d": {"x": [[0]]},
        "e": 10**30,
    }
    for ascii_only in (True, False):
        stream = JsonStream(json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode())
        assert walk(stream) == value
        stream.finish()
    number = JsonStream(b" 12345 ")
    assert number.value() == 12345
    number.finish()


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"[1,\n2,]", 2), (b'{"a": 1,\n}', 2), (b"{1: 2}", 1), (b'{"a"\n\n1}', 3), (b"[1 2]", 1), (b'{"a": tru', 1),
        (b"[[1,\n2]", 2), (b"[1]\n]", 2), (b'["a\nb"]', 1), (b'{"a": "', 1),
    ],
)  # fmt: skip
def test_piece_by_piece_it_is_refused_in_the_same_words(raw, line, monkeypatch):
    for window in (1, 3, 1 << 20):
        monkeypatch.setattr(json_text, "_WINDOW", window)
        for depth in (0, 2):
            stream = JsonStream(raw)
            with pytest.raises(ValueError, match=rf"^not valid JSON \(line {line}\)$"):
                walk(stream, depth)
                stream.finish()


def test_a_fault_is_found_where_it_is():
    """What follows it is not read, nor held."""
    raw = b'{"a": [{"b": ?}' + b" " * (8 << 20) + b"]}"
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1"):
        walk(JsonStream(raw))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_infinity_is_in_configs():
    assert math.isinf(parse_json(b'{"time_step_limit": [0.0, Infinity]}')["time_step_limit"][1])
    with pytest.raises(ValueError, match=r"^not valid JSON \(Infinity\)$"):
        parse_json(b'{"a": Infinity}', constants=False)


def test_half_a_pair_may_have_its_other_half():
    assert parse_json(rb'"\ud83d\ude00"') == "\U0001f600"


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", r"not valid JSON \(line 1\)"),
        (b"{\n}}", r"not valid JSON \(line 2\)"),
        (b"\xef\xbb\xbf{}", r"not valid JSON \(line 1\)"),
        ("{}".encode("utf-16"), r"not UTF-8 text \(byte 0\)"),
        (b'{"a": "\xff"}', r"not UTF-8 text \(byte 7\)"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"a number of 5,000 digits"),
        (b"-" + b"9" * 101, r"a number of 102 digits"),
        (b"[" * 101 + b"]" * 101, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"' + b"a" * 131_073 + b'": 1}', "a key of more than 131,072 characters"),
        (rb'{"\ud800": 1}', "half a surrogate pair"),
        (rb'["\uDFFF"]', "half a surrogate pair"),
    ],
)
def test_what_nobody_writes(raw, what):
    with pytest.raises(ValueError, match=f"^(not usable JSON \\()?{what}"):
        parse_json(raw)
    with pytest.raises(ValueError, match=f"^(not usable JSON \\()?{what}"):
        stream = JsonStream(raw)
        stream.value()
        stream.finish()
    # as a part of something larger, too
    if raw not in (b"", b"\xef\xbb\xbf{}"):
        with pytest.raises(ValueError, match=r"^not "):
            parse_json(b'{"x": [' + raw + b"]}")


def test_a_large_one_takes_the_memory_of_its_parsing():
    raw = json.dumps({f"name.{at}": {"shape": [1, 2], "file": "x"} for at in range(20_000)}).encode()
    peaks = []
    for parse in (json.loads, parse_json):
        tracemalloc.start()
        value = parse(raw)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(value) == 20_000
        del value
    assert peaks[1] < 1.5 * peaks[0]
