"""Release files: what they may say, and what of it is refused with one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from aoconvert.errors import UsageError
from aoconvert.options import make_options
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.release_file import load, options_of, repo_of
from aoconvert.releasing.variants import list_variants

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
    [model] = found.all_models
    assert [repo_of(found, model, each, None) for each in found.variants] == [
        "me/Tiny-1B-int8wo",
        "me/Tiny-1B-int4-hqq",
    ]
    assert repo_of(found, model, first, "others") == "others/Tiny-1B-int8wo"
    assert make_options(first.scheme, options_of(found, model, first, tmp_path)) == make_options(
        "int8wo",
        {
            "device": "cpu",
            "skip": ["re:.*norm.*", "lm_head"],
            "max_shard_size": "5GB",
            "revision": "0123456789abcdef0123456789abcdef01234567",
        },
    )
    made = make_options(second.scheme, options_of(found, model, second, tmp_path))
    assert (made.group_size, made.layout_device, made.skip) == (64, "cuda", ("re:.*norm.*", "lm_head", "proj_out"))
    assert made.settings == {"int4_choose_qparams_algorithm": "hqq"}
    gates = found.gates.over(second.gates)
    assert (gates.min_quantized, gates.min_sqnr_db, gates.evaluated) == (0.9, 15, {"max_kl": 0.02})


def test_every_model_gets_every_variant(tmp_path: Path) -> None:
    models = (
        '[[models]]\nsource = "org/a"\nrevision = "main"\n[[models]]\nsource = "other/a"\nname = "b"\nlicense = "mit"\n'
    )
    text = (
        'name = "x"\nowner = "me"\n' + models + '[[variants]]\nscheme = "int8wo"\n[[variants]]\nscheme = "float8wo"\n'
    )
    path = written(tmp_path, text)
    found = list_variants(path, load(path), ReleaseOptions(output_root=tmp_path / "out"))
    assert [each.name for each in found] == ["a-int8wo", "a-float8wo", "b-int8wo", "b-float8wo"]
    assert [each.repo_id for each in found] == ["me/a-int8wo", "me/a-float8wo", "me/b-int8wo", "me/b-float8wo"]
    assert [(each.source, each.license, each.options) for each in found[1:3]] == [
        ("org/a", None, {"revision": "main"}),
        ("other/a", "mit", {}),
    ]
    assert found[0].folder == tmp_path / "out/tiny/a-int8wo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not TOML"),
        ('name = "x"\n[[variants]]\nscheme = "int8wo"', r"needs a source or \[\[models\]\], and not both"),
        (
            'name = "x"\nrevision = "main"\n[[variants]]\nscheme = "int8wo"\n[[models]]\nsource = "a/b"',
            r"revision and subfolder belong into \[\[models\]\]",
        ),
        (
            'name = "x"\n[[variants]]\nscheme = "int8wo"\n[[models]]\nsource = "a/b"\n[[models]]\nsource = "c/b"',
            "two models are called b",
        ),
        (
            'name = "x"\n[[variants]]\nscheme = "int8wo"\n[[models]]\nsource = ".."',
            "'..' cannot be a model's name",
        ),
        ('name = "x"\nsource = "a/b"', "tiny.toml: variants is missing"),
        ('name = "x"\nsource = "a/b"\nvariants = []', "variants is empty"),
        (
            'name = "x"\nsource = "a/b"\n[[variants]]\nscheme = "int8wo"\nshcheme = "x"',
            r"variant 1: unknown key 'shcheme', did you mean scheme\?",
        ),
        ('name = "x"\nsource = "a/b"\n[[variants]]\n', "variant 1 needs a scheme or a recipe"),
        ('name = "x"\nsource = "a/b"\n' + '[[variants]]\nscheme = "int8wo"\n' * 2, "two variants are called int8wo"),
        (
            'name = "x"\nsource = "a/b"\n[[variants]]\nscheme = "int8wo"\nname = "../x"',
            "cannot be the name of a folder",
        ),
        ('name = "x"\nsource = "a/b"\nrepo = "{who}/x"\n[[variants]]\nscheme = "int8wo"', r"repo has no \{who\}"),
        ('name = "x"\nsource = "a/b"\n[[variants]]\nscheme = "int8wo"\n[gates]\nmax_size = "big"', "is not a size"),
        (
            'name = "x"\nsource = "a/b"\n[[variants]]\nscheme = "int8wo"\ngates = { min_sqnr_db = nan }',
            "variant 1, gates: min_sqnr_db should be a finite number",
        ),
        (
            'name = "x"\nsource = "a/b"\n[[variants]]\nscheme = "int8wo"\nskip = [{ pattern = "x" }, 5]',
            "variant 1, skip 1: reason is missing; tiny.toml: variant 1, skip 2: it is of a wrong type",
        ),
        ('name = "x"\nsource = "a/b"\nvariants = ["int8wo"]', "variant 1: it should be a table"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(written(tmp_path, text))
