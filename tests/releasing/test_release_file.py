"""Release files: what they may say, and what of it is refused with one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from aoconvert.errors import UsageError
from aoconvert.options import make_options
from aoconvert.releasing.release_file import load, options_of, repo_of

WHOLE = """
name = "Tiny"
source = "org/Tiny-1B"
revision = "0123456789abcdef0123456789abcdef01234567"
owner = "me"

[defaults]
device = "cpu"
skip = [{ pattern = "re:.*norm.*", reason = "small", source = "measured" }, "lm_head"]
max_shard_size = "5GB"

[[variants]]
scheme = "int8wo"

[[variants]]
scheme = "int4wo"
group_size = 64
layout_device = "cuda"
skip = ["proj_out"]
set = { int4_choose_qparams_algorithm = "hqq" }
name = "int4-hqq"
repo = "{owner}/{model}-{variant}"
gates = { min_sqnr_db = 15 }

[gates]
min_quantized = 0.9
min_sqnr_db = 20
max_size = "12GB"
max_kl = 0.02
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def test_a_variant_gets_the_defaults_and_its_own(tmp_path: Path) -> None:
    found = load(written(tmp_path, WHOLE))
    first, second = found.variants
    assert [repo_of(found, each, None) for each in found.variants] == ["me/Tiny-1B-int8wo", "me/Tiny-1B-int4-hqq"]
    assert repo_of(found, first, "others") == "others/Tiny-1B-int8wo"
    assert make_options(first.scheme, options_of(found, first, tmp_path)) == make_options(
        "int8wo",
        {
            "device": "cpu",
            "skip": ["re:.*norm.*", "lm_head"],
            "max_shard_size": "5GB",
            "revision": "0123456789abcdef0123456789abcdef01234567",
        },
    )
    made = make_options(second.scheme, options_of(found, second, tmp_path))
    assert (made.group_size, made.layout_device, made.skip) == (64, "cuda", ("re:.*norm.*", "lm_head", "proj_out"))
    assert made.settings == {"int4_choose_qparams_algorithm": "hqq"}
    gates = found.gates.over(second.gates)
    assert (gates.min_quantized, gates.min_sqnr_db, gates.evaluated) == (0.9, 15, {"max_kl": 0.02})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not TOML"),
        ('name = "x"\nsource = "a/b"', "variants: Field required"),
        ('name = "x"\nsource = "a/b"\nvariants = []', "variants: List should have at least 1 item"),
        (
            'name = "x"\nsource = "a/b"\n[[variants]]\nscheme = "int8wo"\nshcheme = "x"',
            r"variants.0.shcheme: Extra inputs",
        ),
        ('name = "x"\nsource = "a/b"\n[[variants]]\n', "variant 1 needs a scheme or a recipe"),
        ('name = "x"\nsource = "a/b"\n' + '[[variants]]\nscheme = "int8wo"\n' * 2, "two variants are called int8wo"),
        (
            'name = "x"\nsource = "a/b"\n[[variants]]\nscheme = "int8wo"\nname = "../x"',
            "cannot be the name of a folder",
        ),
        ('name = "x"\nsource = "a/b"\nrepo = "{who}/x"\n[[variants]]\nscheme = "int8wo"', r"repo has no \{who\}"),
        ('name = "x"\nsource = "a/b"\n[[variants]]\nscheme = "int8wo"\n[gates]\nmax_size = "big"', "is not a size"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(written(tmp_path, text))
