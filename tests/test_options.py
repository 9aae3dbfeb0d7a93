from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoconvert.errors import UsageError
from aoconvert.options import QuantizeOptions, parse_size

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@given(st.integers(0, 10**24), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]), st.booleans())
def test_whole_sizes_are_exact(count: int, unit: str, gap: str, lower: bool) -> None:
    text = f"{count}{gap}{unit}"
    assert parse_size(text.lower() if lower else text) == count * UNITS[unit]


@given(st.integers(0, 10**9), st.text("0123456789", min_size=1, max_size=12), st.sampled_from(sorted(UNITS)))
def test_decimal_sizes_round_down(whole: int, digits: str, unit: str) -> None:
    assert parse_size(f"{whole}.{digits}{unit}") == int(Fraction(f"{whole}.{digits}") * UNITS[unit])


@given(st.text(max_size=400))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except UsageError as error:
        assert error.hint


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "5 G B", "5PB", "1,5GB", "nan", "inf", "5gigs"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_a_very_long_number_is_a_size() -> None:
    assert parse_size("9" * 400) == int("9" * 400)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of bfloat16, float16, float32, auto"),
        ({"min_quantized": 1.1}, "is not a fraction"),
        ({"min_quantized": -0.1}, "is not a fraction"),
        ({"min_quantized": float("nan")}, "is not a fraction"),
        ({"max_shard_size": 0}, "must be positive"),
        ({"max_shard_size": -5}, "must be positive"),
        ({"skip": ("re:[",)}, "is not a regular expression"),
        ({"skip": ("fine", "re:(?P<a>x)(?P<a>y)")}, "is not a regular expression"),
    ],
)
def test_wrong_values(values: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what.replace("[", r"\[")):
        QuantizeOptions(scheme="int8wo", **values)


@pytest.mark.parametrize("goal", [{"min_sqnr": float("nan")}, {"min_sqnr": float("inf")}, {"min_sqnr": -1.0}])
@pytest.mark.parametrize("name", ["min_sqnr", "target_bits", "target_size"])
def test_a_goal_is_a_finite_positive_number(goal: dict[str, float], name: str) -> None:
    (value,) = goal.values()
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be a positive, finite number"):
        QuantizeOptions(scheme="auto", **{name: value})


def test_a_size_that_no_float_can_count_is_no_goal() -> None:
    with pytest.raises(UsageError, match="--target-size must be a positive, finite number"):
        QuantizeOptions(scheme="auto", target_size=parse_size("9" * 400))


def test_no_scheme_is_needed_where_every_component_has_its_own() -> None:
    assert QuantizeOptions(None, components={"transformer": "int8wo", "vae": "float8wo"}).scheme is None
    with pytest.raises(UsageError, match="no scheme"):
        QuantizeOptions(None, components={"transformer": "int8wo", "vae": None})
    for scheme in (None, "auto"):
        with pytest.raises(UsageError, match="auto cannot be the scheme of a single component"):
            QuantizeOptions(scheme, components={"transformer": "Auto"}, min_sqnr=30.0)


@pytest.mark.parametrize("values", [{"group_size": 32}, {"settings": {"granularity": "per_row"}}])
def test_options_of_a_scheme_without_a_scheme(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="need --scheme, which is missing"):
        QuantizeOptions(None, recipe=Path("r.toml"), **values)
    assert QuantizeOptions("int8wo", recipe=Path("r.toml"), **values).recipe
    assert QuantizeOptions(None, recipe=Path("r.toml"), components={"vae": "int8wo"}, **values).recipe


def test_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(QuantizeOptions(scheme="int8wo", token="hf_secret"))
