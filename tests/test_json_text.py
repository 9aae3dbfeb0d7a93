"""JSON from outside: what Python writes is read, what nobody writes is refused in a few words."""

import json
import math
import tracemalloc

import pytest

from aoconvert.json_text import parse_json


@pytest.mark.parametrize(
    "value",
    [{}, [], None, 1.5, "text", {"a": [1, {"b": None}]}, {"model_max_length": 10**30}, {"a": "\x1b[31m\u202e"}],
)
def test_what_python_writes(value):
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


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
