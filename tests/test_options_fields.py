"""An option is said once, in a field: the command line, keywords, the recorded command and the card agree."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from aoconvert.cards.reproduce import OPTIONS
from aoconvert.cli.bench import command as bench
from aoconvert.cli.evaluate import command as evaluate
from aoconvert.cli.inspect import command as inspect
from aoconvert.cli.migrate import command as migrate
from aoconvert.cli.options import conversion
from aoconvert.cli.verify import command as verify
from aoconvert.errors import UsageError
from aoconvert.options import (
    HubOptions,
    QuantizeKwargs,
    QuantizeOptions,
    VerifyKwargs,
    VerifyOptions,
    make_options,
)
from aoconvert.options.bench import BenchKwargs, BenchOptions
from aoconvert.options.evaluate import EvaluateKwargs, EvaluateOptions
from aoconvert.options.fields import defaults_of, options_of, record
from aoconvert.options.migrate import MigrateKwargs, MigrateOptions

ROOT = Path(__file__).parents[1]


@click.command()
@conversion
def typed(*, source: str, **options: Any) -> QuantizeOptions:
    return make_options(options.pop("scheme"), options)


def parse(words: list[str]) -> QuantizeOptions:
    found: QuantizeOptions = typed.main(args=["source", *words], prog_name="typed", standalone_mode=False)
    return found


@pytest.mark.parametrize(
    ("keywords", "options"),
    [
        (QuantizeKwargs, QuantizeOptions),
        (VerifyKwargs, VerifyOptions),
        (MigrateKwargs, MigrateOptions),
        (BenchKwargs, BenchOptions),
        (EvaluateKwargs, EvaluateOptions),
    ],
)
def test_the_keywords_that_a_type_checker_knows_are_the_fields(keywords: type, options: type) -> None:
    assert [*keywords.__annotations__] == [name for name in options_of(options) if name != "scheme"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (typed, QuantizeOptions),
        (verify, VerifyOptions),
        (inspect, HubOptions),
        (migrate, MigrateOptions),
        (bench, BenchOptions),
        (evaluate, EvaluateOptions),
    ],
)
def test_each_field_is_an_option_of_the_command_line(command: click.Command, options: Any) -> None:
    assert [*options_of(options)] == [*options.__dataclass_fields__]
    assert {parameter.name for parameter in command.params} > {*options.__dataclass_fields__}
    # a command keeps the help option that it was first asked with, for later tests too
    shown = CliRunner().invoke(command, ["--help"], help_option_names=["-h", "--help"]).output
    for field, option in options_of(options).items():
        assert all(re.search(rf"{name}\b", shown) for name in option.names(field)), field
        assert option.help.partition(" ")[0] in shown


@pytest.mark.parametrize("options", [QuantizeOptions, VerifyOptions, MigrateOptions, BenchOptions, EvaluateOptions])
def test_the_hub_is_asked_by_the_same_options_everywhere(options: Any) -> None:
    ours = options_of(HubOptions)
    assert {field: options_of(options)[field] for field in ours} == ours
    given = {"revision": "v1", "token": "hf_secret", "cache_dir": Path("cache"), "local_files_only": True}
    made = options(**given, **({"scheme": "int8wo"} if options is QuantizeOptions else {}))
    assert made.hub == HubOptions(**given)
    assert "hf_secret" not in repr(made) + repr(made.hub)


def test_defaults_are_those_of_the_dataclass() -> None:
    made = parse(["--scheme", "int8wo"])
    assert made == QuantizeOptions("int8wo")
    assert {name: getattr(made, name) for name in defaults_of(QuantizeOptions)} == dict(defaults_of(QuantizeOptions))


NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "group_size": st.integers(1, 512),
        "settings": st.dictionaries(NAME, NAME, max_size=3),
        "skip": st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), max_size=3).map(
            lambda items: tuple(item for item in items if not item.startswith(("re:", "-")))
        ),
        "allow_missing": st.lists(NAME, max_size=2).map(tuple),
        "components": st.dictionaries(NAME, st.none() | NAME.filter(lambda name: name != "auto"), max_size=3),
        "component_only": st.booleans(),
        "untie": st.booleans(),
        "default_skips": st.booleans(),
        "dtype": st.sampled_from(["float16", "bfloat16", "auto", None]),
        "device": st.sampled_from(["auto", "cpu", "cuda"]),
        "max_shard_size": st.integers(1, 10**12),
        "min_quantized": st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        "revision": st.just("0" * 40),
        "subfolder": NAME,
        "variant": NAME,
        "trust_remote_code": st.booleans(),
    },
)


@given(GIVEN)
def test_what_is_recorded_gives_the_same_options_again(values: dict[str, Any]) -> None:
    options = QuantizeOptions("int8wo", **values)
    words = record(options, {})
    assert parse(words) == options
    assert {word for word in words if word.startswith("--")} <= OPTIONS.keys()


def test_what_changes_no_byte_is_not_recorded() -> None:
    options = QuantizeOptions(
        "int8wo",
        recipe=Path("/home/me/rules.toml"),
        output=Path("/home/me/out"),
        overwrite=True,
        resume=False,
        token="hf_secret",
        cache_dir=Path("/home/me/cache"),
        local_files_only=True,
    )
    decided = {"revision": "0" * 40, "device": "cpu"}
    assert record(options, decided) == [
        *("--scheme", "int8wo", "--recipe", "rules.toml", "--revision", "0" * 40, "--device", "cpu")
    ]


def test_the_order_of_the_recorded_command() -> None:
    """Commands that were recorded before are compared with those of today by eye."""
    words = ["--trust-remote-code", "--no-default-skips", "--min-quantized", "0.25", "--variant", "fp16", "--untie"]
    words += ["--component", "vae=int8wo", "--allow-missing", "a", "--skip", "b", "--set", "c=d", "--group-size", "32"]
    assert record(parse([*words, "--scheme", "int4wo"]), {"revision": "0" * 40, "device": "cpu"}) == [
        *("--scheme", "int4wo", "--revision", "0" * 40, "--group-size", "32", "--set", "c=d", "--skip", "b"),
        *("--allow-missing", "a", "--component", "vae=int8wo", "--variant", "fp16", "--min-quantized", "0.25"),
        *("--device", "cpu", "--no-default-skips", "--untie", "--trust-remote-code"),
    ]


@pytest.mark.parametrize(
    ("values", "field", "made"),
    [
        ({"skip": "a"}, "skip", ("a",)),
        ({"skip": ["a", "b"]}, "skip", ("a", "b")),
        ({"components": "vae"}, "components", {"vae": None}),
        ({"components": ["vae", "unet"]}, "components", {"vae": None, "unet": None}),
        ({"components": {"vae": "int8wo"}}, "components", {"vae": "int8wo"}),
        ({"max_shard_size": "5GB"}, "max_shard_size", 5 * 10**9),
        ({"max_shard_size": 5}, "max_shard_size", 5),
        ({"output": "here"}, "output", Path("here")),
        ({"cache_dir": None}, "cache_dir", None),
    ],
)
def test_keyword_arguments(values: dict[str, Any], field: str, made: object) -> None:
    assert getattr(make_options("int8wo", values), field) == made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "a"], "--set 'a' is not KEY=VALUE"),
        (["--set", "a=b", "--set", "a=c"], "--set a is given twice"),
        (["--component", "vae="], "is neither NAME nor NAME=SCHEME"),
        (["--component", "vae", "--component", "vae=int8wo"], "--component vae is given twice"),
        (["--candidates", "a,,b"], "has an empty name"),
        (["--target-size", "many"], "'many' is not a size"),
    ],
)
def test_what_is_typed_wrong(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parse(words)


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="nosuch"):
        make_options("int8wo", {"nosuch": 1})


def test_the_types_of_the_fields_are_those_that_the_options_make() -> None:
    for name, hint in get_type_hints(QuantizeOptions).items():
        if name in defaults_of(QuantizeOptions) and isinstance(hint, type):
            assert isinstance(defaults_of(QuantizeOptions)[name], hint), name


def test_neither_click_nor_torch_is_imported() -> None:
    code = "import sys, aoconvert.options; print({'click', 'torch', 'huggingface_hub'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"
