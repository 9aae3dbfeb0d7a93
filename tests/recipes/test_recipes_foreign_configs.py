"""A quantization_config by somebody else: only what a torchao config is made of, and no pattern without end."""

import re
import time

import pytest
from torchao.core.config import config_to_dict
from torchao.quantization import FqnToConfig

from aoconvert import schemes
from aoconvert.errors import UsageError
from aoconvert.recipes.foreign_configs import check_quantization, is_costly
from aoconvert.recipes.recorded import from_json, from_quantization_config
from aoconvert.schemes.table import catalogue


def config(kind, **data):
    return {"_type": kind, "_version": 1, "_data": data}


def quantization(default, **more):
    return {"quant_method": "torchao", "quant_type": {"default": default}, **more}


HOSTILE = [
    config("AffineQuantizedMinMaxObserver", block_size=[1 << 30]),
    config("Int8WeightOnlyConfig", granularity=config("AffineQuantizedMinMaxObserver")),
    config("FqnToConfig", fqn_to_config={"a": config("SmoothQuantConfig", step="prepare")}),
    config("Int8WeightOnlyConfig", nested=[{"deep": [config("quantize_")]}]),
    config("importlib"),
    config("torch.dtype") | {"_data": "load"},
    config("FqnToConfig", fqn_to_config={"re:(a+)+$": None}),
    config("FqnToConfig", fqn_to_config={"re:" + "a" * 20_000: None}),
]


@pytest.mark.parametrize("default", HOSTILE)
def test_what_is_no_part_of_a_config_is_refused(default):
    with pytest.raises(ValueError, match=r"which is not part of|could take forever|does not have"):
        check_quantization(quantization(default))
    with pytest.raises(UsageError, match=r"^config\.json: (it names|matching its pattern)"):
        from_quantization_config(quantization(default), "transformers")


def test_modules_that_are_not_converted_are_patterns():
    fine = config_to_dict(schemes.get("int8wo").config)
    check_quantization(quantization(fine, modules_to_not_convert=["lm_head", "model.layers.0.mlp"]))
    with pytest.raises(ValueError, match="could take forever"):
        check_quantization(quantization(fine, modules_to_not_convert=["(.*)*x"]))


def test_every_config_that_we_write_is_known():
    count = 0
    for entry in catalogue():
        try:
            made = config_to_dict(schemes.get(entry.name).config)
        except Exception:  # one that this machine cannot make
            continue
        check_quantization(quantization(made))
        check_quantization(quantization(config_to_dict(FqnToConfig({"re:.*mlp.*": None, "a.b.weight": None}))))
        count += 1
    assert count > 30


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(a|b|ab)*c", "(.*)*", "((a*)b)*", "(a{1,9}){1,9}", "(?:x+x+)+y"]
)
def test_patterns_that_explode(pattern):
    assert is_costly(pattern)


@pytest.mark.parametrize("pattern", [".*.*.*.*.*x", "a*" * 30, "x" * 10_001])
def test_patterns_that_take_long(pattern):
    assert is_costly(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(1|2|3)\..*",
        r"lm_head",
        r".*(attn|mlp).*proj\.weight",
        r"[+*]+",
        r"a\+\*b{2}",
        r"(?:a|b)?c",
        r"([",
    ],
)
def test_patterns_that_people_write(pattern):
    assert not is_costly(pattern)


def test_what_is_let_through_ends():
    """The longest names, against what comes nearest to being refused."""
    for pattern in (".*.*.*.*x", r"(?:a|b).*c.*d.*e.*", "[a-z]*[a-z]*[a-z]*[a-z]*_"):
        assert not is_costly(pattern)
        began = time.process_time()
        assert re.fullmatch(pattern, "a" * 100) is None
        assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["{", "[" * 5000, '{"a": ' + "9" * 5000 + "}", '"\\ud800"'])
def test_a_recipe_that_is_no_json(text):
    with pytest.raises(UsageError, match=r"^recipe x\.json: not (valid|usable) JSON \("):
        from_json(text.encode(), "x.json")
