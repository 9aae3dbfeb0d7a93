"""Recipe files: what they say, what is wrong with them, and how they are written back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TorchAoConfig as diffusers_config
from diffusers.quantizers.torchao import TorchAoHfQuantizer as diffusers_quantizer
from helpers import tiny  # noqa: F401  (its imports come first)
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_toml import dump
from transformers.quantizers.quantizers_utils import should_convert_module

from aoconvert import schemes
from aoconvert.errors import UsageError
from aoconvert.recipes import (
    Choice,
    Recipe,
    RecipeRule,
    Section,
    from_config,
    from_quantization_config,
    load,
    rules,
    scheme_of_config,
)
from aoconvert.recipes.fqn import fold

EXAMPLE = r"""
default = { scheme = "int4wo", group_size = 64, layout_device = "cuda" }

[[rule]]
match = 're:transformer_blocks\..*\.attn1\.to_[qkv]'
scheme = "float8wo"

[[rule]]
match = "proj_out"
scheme = "Skip"

[component.text_encoder]
default = "skip"

[[component.text_encoder.rule]]
match = "re:.*[.]wi_.*"
scheme = "intx4wo"
group_size = 32
set = { mapping_type = "ASYMMETRIC", scale_dtype = "float32" }
"""


def write(folder: Path, text: str, name: str = "r.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_what_a_file_says(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, EXAMPLE))
    asymmetric = (("mapping_type", "ASYMMETRIC"), ("scale_dtype", "float32"))
    assert recipe.base == Section(
        Choice("int4wo", 64, (), "cuda"),
        (
            RecipeRule(r"re:transformer_blocks\..*\.attn1\.to_[qkv]", Choice("float8wo")),
            RecipeRule("proj_out", Choice(None)),
        ),
    )
    section = Section(Choice(None), (RecipeRule("re:.*[.]wi_.*", Choice("intx4wo", 32, asymmetric)),))
    assert dict(recipe.components) == {"text_encoder": section}


def test_a_component_follows_its_own_section_alone(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, EXAMPLE))
    base = rules(recipe, "transformer", None)
    assert base.default is not None
    assert (base.default.name, base.default.group_size, base.default.layout.device) == ("int4wo", 64, "cuda")
    assert [rule.label for rule in base.rules] == [
        r"r.toml re:transformer_blocks\..*\.attn1\.to_[qkv]",
        "r.toml proj_out",
    ]
    assert [rule.scheme.name if rule.scheme else None for rule in base.rules] == ["float8wo", None]
    text = rules(recipe, "text_encoder", None)
    assert text.default is None
    (rule,) = text.rules
    assert rule.scheme is not None
    assert rule.scheme.config_dict["_data"]["mapping_type"] == {"_type": "MappingType", "_data": "ASYMMETRIC"}


def test_the_layout_device_of_the_call_goes_before_the_recipe_and_the_devices_after(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, EXAMPLE))
    says_nothing = load(write(tmp_path, 'default = "int4wo"', "n.toml"))

    def device(recipe: Recipe, **kwargs: str) -> str:
        default = rules(recipe, "", None, **kwargs).default
        assert default is not None
        return default.layout.device

    assert device(recipe, device="xpu") == "cuda"
    assert device(recipe, layout_device="cpu", device="xpu") == "cpu"
    assert device(says_nothing, device="xpu") == "xpu"


def test_scheme_is_the_default_where_the_recipe_has_none(tmp_path: Path) -> None:
    int8 = schemes.get("int8wo")
    recipe = load(write(tmp_path, '[[rule]]\nmatch = "a"\nscheme = "float8wo"'))
    assert rules(recipe, "", int8).default is int8
    assert rules(recipe, "", None).default is None
    with pytest.raises(UsageError, match=r"r.toml has a default \(int4wo\), but the command line says int8wo"):
        rules(load(write(tmp_path, EXAMPLE)), "transformer", int8)


RULE = '[[rule]]\nmatch = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\na = ?", r"recipe .*r\.toml is not TOML: .*line 2"),
        ("", r"r\.toml has neither a default nor rules"),
        ("defualt = 'int8wo'", r"r\.toml: unknown key 'defualt'"),
        ("default = 3", r"r\.toml, default: 3 is neither a scheme nor a table"),
        ("default = 'int9wo'", r"r\.toml, default: there is no scheme 'int9wo'"),
        ("default = 'auto'", r"r\.toml, default: auto is not a single scheme"),
        ("default = { scheme = 'int8wo', group = 3 }", r"r\.toml, default: unknown key 'group'"),
        ("default = { group_size = 3 }", r"r\.toml, default: scheme is missing"),
        ("[rule]\nmatch = 'a'", r"r\.toml: rule should be a list of tables$"),
        (RULE, r"r\.toml, rule 1: scheme is missing"),
        (RULE + "scheme = 'int8wo'\nskip = true", r"r\.toml, rule 1: unknown key 'skip'"),
        (RULE + "scheme = 'skip'\ngroup_size = 8", r"rule 1 \('a'\): scheme .skip. takes no options"),
        (RULE + "scheme = 'int8wo'\ngroup_size = '8'", r"rule 1: group_size should be a whole number$"),
        (RULE + "scheme = 'int8wo'\nset = { granularity = [] }", r"rule 1: set\.granularity is neither text nor"),
        (RULE + "scheme = 'intx'", r"rule 1 \('a'\): 'intx' does not specify the weight_dtype"),
        ((RULE + "scheme = 'int8wo'\n") * 2, r"rule 2 \('a'\): rule 1 has the same pattern"),
        ("[[rule]]\nmatch = 're:['\nscheme = 'skip'", r"rule 1 \('re:\['\): not a regular expression: unterminated"),
        ("[[rule]]\nmatch = 're:'\nscheme = 'skip'", r"rule 1 \('re:'\): an empty pattern"),
        ("[[rule]]\nmatch = '_default'\nscheme = 'skip'", r"_default is not a pattern"),
        ("[[rule]]\nmatch = \"a\\nb\"\nscheme = 'x'", r"rule 1 \('a\\nb'\): there is no scheme 'x'"),
        ("[component.\"a\\nb\"]\ndefault = 'x'", r"\[component\.'a\\nb'\] default: there is no scheme 'x'"),
        ("[component]\nvae = 3", r"r\.toml, \[component\.vae\]: should be a table$"),
        ("rule = [1]", r"r\.toml, rule 1: should be a table$"),
        (RULE + "scheme = 'int4wo'\nlayout_device = ''", r"r\.toml, rule 1 \('a'\): layout_device is empty"),
        ("[component.vae]\nschem = 'skip'", r"r\.toml, \[component\.vae\]: unknown key 'schem'"),
        (
            "[[component.vae.rule]]\nmatch = 3\nscheme = 'skip'",
            r"\[component\.vae\], rule 1: match should be text$",
        ),
    ],
)
def test_every_mistake_is_one_line_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(write(tmp_path, text))
    assert "\n" not in caught.value.message + (caught.value.hint or "")


def test_the_hint_is_for_what_is_wrong(tmp_path: Path) -> None:
    for text, hint in (
        ("default = { scheme = 3 }", "a default has"),
        (RULE + "scheme = 3", "a rule has"),
        ("[component.vae]\ndefault = { group_size = 3 }", "a default has"),
    ):
        with pytest.raises(UsageError) as caught:
            load(write(tmp_path, text))
        assert (caught.value.hint or "").startswith(hint)


def test_a_file_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(UsageError, match="/dev/zero is larger than 64 MiB"):
        load(Path("/dev/zero"))


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"default = 'int8w\xf6'")
    for name, content, message in (
        ("a.json", "{", "not valid JSON"),
        ("b.json", "[]", "says nothing about quantization"),
        ("c.json", '{"quantization_config": {"quant_method": "gptq"}}', "'gptq', not 'torchao'"),
        (
            "d.json",
            '{"quantization_config": {"quant_method": "torchao", "quant_type": "int8"}}',
            "does not hold a torchao config",
        ),
        ("e.json", '{"tool": 1, "components": []}', "not an aoconvert manifest"),
    ):
        with pytest.raises(UsageError, match=message):
            load(write(tmp_path, content, name))
    for path, message in (
        (tmp_path / "absent.toml", "No such file"),
        (tmp_path, "Is a directory"),
        (latin, "is not UTF-8"),
    ):
        with pytest.raises(UsageError, match=message):
            load(path)


def test_options_that_a_scheme_does_not_take_are_found_with_their_place(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, RULE + "scheme = 'int8dq'\ngroup_size = 32"))
    with pytest.raises(UsageError, match=r"r\.toml, rule 'a': int8dq has a fixed group size"):
        rules(recipe, "", None)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
NAMES = TEXT.filter(lambda text: not text.startswith("re:") and text != "_default")
PATTERNS = NAMES | TEXT.map(lambda text: "re:" + re.escape(text))
OPTIONS = st.builds(
    Choice,
    st.sampled_from(["int8wo", "int4wo", "FP8WO"]),
    st.none() | st.integers(1, 512),
    st.dictionaries(TEXT, TEXT, max_size=2).map(lambda pairs: tuple(pairs.items())),
    st.none() | TEXT,
)
CHOICES = st.just(Choice(None)) | OPTIONS
RULES = st.lists(st.builds(RecipeRule, PATTERNS, CHOICES), max_size=3, unique_by=lambda rule: rule.pattern).map(tuple)
SECTIONS = st.builds(Section, st.none() | CHOICES, RULES)


@settings(max_examples=60)
@given(SECTIONS, st.dictionaries(TEXT, SECTIONS, max_size=2))
def test_what_is_dumped_is_loaded_again(
    tmp_path_factory: pytest.TempPathFactory, base: Section, components: dict[str, Section]
) -> None:
    if base == Section() and not components:
        base = Section(Choice("int8wo"))
    recipe = Recipe("r.toml", base, components)
    path = tmp_path_factory.getbasetemp() / "r.toml"
    path.write_text(dump(recipe), encoding="utf-8", newline="")
    assert load(path) == recipe


def test_a_dumped_pattern_looks_as_it_is() -> None:
    recipe = Recipe("", Section(Choice("int8wo"), (RecipeRule(r"re:a\.\d+", Choice(None)),)))
    assert dump(recipe) == 'default = "int8wo"\n\n[[rule]]\nmatch = \'re:a\\.\\d+\'\nscheme = "skip"\n'


OPTIONS_OF = [
    ("int8wo", {"group_size": 64}),
    ("int8wo", {"settings": {"granularity": "per_tensor"}}),
    ("int8dq", {"settings": {"act_mapping_type": "asymmetric"}}),
    ("int4wo", {"group_size": 32, "layout_device": "cuda"}),
    ("int4wo", {"layout_device": "cuda", "settings": {"int4_choose_qparams_algorithm": "hqq"}}),
    ("int4wo", {"layout_device": "xpu"}),
    ("intx4wo", {"group_size": 32, "settings": {"mapping_type": "asymmetric"}}),
    ("intx2wo", {"group_size": 64, "settings": {"intx_choose_qparams_algorithm": "hqq_scale_only"}}),
    ("float8dq", {"settings": {"activation_value_lb": "1.5"}}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS_OF)
def test_the_scheme_and_options_of_a_torchao_config(name: str, options: dict[str, Any]) -> None:
    same_scheme(schemes.get(name, **options))


def same_scheme(scheme: schemes.Scheme) -> Choice:
    choice = scheme_of_config(scheme.config_dict)
    assert choice.scheme is not None
    again = schemes.get(
        choice.scheme,
        group_size=choice.group_size,
        settings=dict(choice.settings),
        layout_device=choice.layout_device,
    )
    assert again.config_dict == scheme.config_dict
    assert again.layout.device == scheme.layout.device
    return choice


def available() -> list[str]:
    return [entry.name for entry in schemes.catalogue() if schemes.availability(entry) is None]


@pytest.mark.parametrize("name", ["int8wo", "int4wo", "float8wo_e5m2", "float8dq_row", "uint3wo", "nvfp4"])
def test_a_config_gives_the_scheme_it_is_from(name: str) -> None:
    assert same_scheme(schemes.get(name)).scheme == name


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", available())
def test_every_config_gives_the_scheme_it_is_from(name: str) -> None:
    assert same_scheme(schemes.get(name)).scheme == name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no scheme makes the torchao config None"),
        ({"_type": ["x"]}, "is not part of a torchao config"),
        ({"_type": "quantize_", "_data": {}}, "is not part of a torchao config"),
        ({"_type": "Int8WeightOnlyConfig", "_data": {"nonsense": 1}}, "torchao cannot read this Int8WeightOnlyConfig"),
        (
            {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"int4_packing_format": "preshuffled"}},
            "no scheme makes the torchao config Int4WeightOnlyConfig",
        ),
    ],
)
def test_a_config_that_no_scheme_makes(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"config.json: .*{message}"):
        from_config(config, "config.json")


def test_a_quantization_config_of_others_is_a_recipe() -> None:
    int8, float8 = (schemes.get(name).config_dict for name in ("int8wo", "float8wo"))
    entries = {r"re:.*\.v_proj": float8, "model.layers.0.mlp.up_proj": None, "_default": int8}
    config = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "ModuleFqnToConfig", "_data": {"module_fqn_to_config": entries}}},
        "modules_to_not_convert": ["lm_head"],
    }
    recipe = from_quantization_config(config, "transformers")
    assert recipe.base.default == Choice("int8wo")
    made = rules(recipe, "", None)

    def scheme(module: str) -> str | None:
        rule = made.match(f"{module}.weight", module)
        chosen = made.default if rule is None else rule.scheme
        return chosen.name if chosen is not None else None

    assert scheme("model.layers.1.self_attn.v_proj") == "float8wo"
    assert scheme("model.layers.1.self_attn.k_proj") == "int8wo"
    assert scheme("model.layers.0.mlp.up_proj") is None
    assert scheme("lm_head") is None
    assert scheme("lm_head_2") == "int8wo"


MODULES = ["proj_out", "a.proj_out", "a.0.proj_out", "a.1.ff", "a.11.ff", "b.a.1.ff", "ff"]


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize(
    "entry", ["proj_out", "proj_out.weight", "a.0", "a.1", r"a.\d+", "ff", "a", "(", "a.proj_out.weight", "out"]
)
def test_modules_to_not_convert_means_what_its_library_means(library: str, entry: str) -> None:
    config = {
        "quant_method": "torchao",
        "quant_type": {"default": schemes.get("int8wo").config_dict},
        "modules_to_not_convert": [entry],
    }
    made = rules(from_quantization_config(config, library), "", None)
    assert made.default is not None
    with torch.device("meta"):
        model = torch.nn.Module()
        for name in MODULES:
            owner = model
            for part in name.split(".")[:-1]:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(name.split(".")[-1], torch.nn.Linear(2, 2))
    for name in MODULES:
        rule = made.match(f"{name}.weight", name)
        if library == "diffusers":
            quantizer = diffusers_quantizer(diffusers_config(made.default.config))
            quantizer.modules_to_not_convert = [entry]
            quantized = quantizer.check_if_quantized_param(model, None, f"{name}.weight", {})
        elif entry == "(":
            continue  # transformers fails on it
        else:
            quantized = should_convert_module(f"{name}.weight", [entry])
        assert (rule is None) == quantized, name


NUMBERED = st.lists(st.sampled_from(["a", "b", "0", "1", "12", "x.y", "(", "q_proj"]), min_size=1, max_size=4).map(
    ".".join
)


@given(st.sets(NUMBERED, min_size=1, max_size=30), st.sets(NUMBERED, max_size=30))
def test_folded_names_match_themselves_once_and_nothing_else(names: set[str], others: set[str]) -> None:
    patterns = list(fold(sorted(names)))
    assert len(patterns) <= len(names)
    for name in names | others:
        hits = [
            pattern
            for pattern in patterns
            if (re.fullmatch(pattern[3:], name) if pattern.startswith("re:") else pattern == name)
        ]
        assert len(hits) == (name in names)


def test_layers_fold_to_one_pattern_a_block() -> None:
    names = [f"layers.{layer}.attn.{part}" for layer in range(3) for part in ("q", "k")] + ["head"]
    assert list(fold(names)) == [r"re:layers\.(?:0|1|2)\.attn\.(?:q|k)", "head"]
