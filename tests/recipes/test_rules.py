"""Which rule is for a tensor, held against torchao's own ``FqnToConfig``."""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, PerGroup, quantize_

from aoconvert import schemes
from aoconvert.recipes.rules import Rule, Rules, find_unmatched, skip_rules

NAMES = st.text("ab.1", min_size=1, max_size=6)


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


@given(st.lists(NAMES, max_size=6), st.lists(NAMES, max_size=4))
def test_exact_patterns(names: list[str], patterns: list[str]) -> None:
    rules = Rules((), None, skip_rules(patterns))
    for name in names:
        by_name = [pattern for pattern in patterns if pattern == name]
        by_module = [pattern for pattern in patterns if pattern == module_of(name)]
        found = rules.match(name, module_of(name))
        assert (found.pattern if found else None) == next(iter(by_name + by_module), None)
    unused = [pattern for pattern in patterns if pattern not in names and pattern not in map(module_of, names)]
    lines = find_unmatched(rules, [*names, *map(module_of, names)])
    assert len(lines) == len(unused)
    for pattern, line in zip(unused, lines, strict=True):
        assert line.startswith(f"--skip {pattern!r} matches nothing")


@given(st.lists(NAMES, max_size=6), NAMES)
def test_an_escaped_name_as_a_regex_is_the_exact_name(names: list[str], name: str) -> None:
    regex, exact = Rules((), None, skip_rules([f"re:{re.escape(name)}"])), Rules((), None, skip_rules([name]))
    assert [bool(regex.match(item, module_of(item))) for item in names] == [
        bool(exact.match(item, module_of(item))) for item in names
    ]
    everything = [*names, *map(module_of, names)]
    assert bool(find_unmatched(regex, everything)) == bool(find_unmatched(exact, everything))


LAYERS = ("a.x", "a.y", "b.x", "b.y")
PATTERNS = st.sampled_from(
    [layer + end for layer in LAYERS for end in ("", ".weight")]
    + [r"re:a\..*", r"re:.*\.x", r"re:.*\.x\.weight", r"re:b\..*weight", r"re:.*\.[xy]"]
)


@settings(deadline=None)
@given(st.lists(st.tuples(PATTERNS, st.sampled_from([None, 16, 32, 64])), unique_by=lambda item: item[0], max_size=5))
def test_precedence_is_torchaos(chosen: list[tuple[str, int | None]]) -> None:
    """The group size tells which rule it was.

    By its documentation: torchao 0.18 goes on to the further regular expressions for a tensor after the first one, and
    after an exact name.
    """
    patterns = [pattern for pattern, _ in chosen]
    for layer in LAYERS:
        found = [item for item in patterns if item.startswith("re:") and re.fullmatch(item[3:], f"{layer}.weight")]
        assume(len(found) + (f"{layer}.weight" in patterns) <= 1)
    model = nn.ModuleDict({side: nn.ModuleDict({n: nn.Linear(128, 2, bias=False) for n in "xy"}) for side in "ab"})
    configs = {pattern: Int8WeightOnlyConfig(granularity=PerGroup(size)) if size else None for pattern, size in chosen}
    model = model.to(torch.bfloat16)
    if configs:
        quantize_(model, FqnToConfig(OrderedDict(configs)), filter_fn=None)
    rules = Rules(
        tuple(
            Rule(pattern, schemes.get("int8wo", group_size=size) if size else None, "test") for pattern, size in chosen
        ),
        None,
    )
    for layer in LAYERS:
        weight = model.get_submodule(layer).weight
        rule = rules.match(f"{layer}.weight", layer)
        scheme = rule.scheme if rule is not None else None
        assert getattr(weight, "block_size", [None, None])[1] == (scheme.group_size if scheme is not None else None)


def test_what_the_command_line_skips_goes_first() -> None:
    scheme = schemes.get("int8wo")
    rules = Rules((Rule("a.weight", scheme, "recipe"),), scheme, skip_rules(["re:a.*"]))
    found = rules.match("a.weight", "a")
    assert found is not None
    assert found.label == "--skip re:a.*"


def test_a_rule_for_every_layer_of_a_large_model() -> None:
    names = [f"model.layers.{layer}.{part}_proj" for layer in range(500) for part in "qkvo"]
    rules = Rules(tuple(Rule(name, None, "recipe.toml") for name in reversed(names)), None)
    assert all(rules.match(f"{name}.weight", name) == Rule(name, None, "recipe.toml") for name in names)
    assert find_unmatched(rules, names) == []
    # of another model; the nearest of 2000 names take 0.7 s to find, so only for the first few
    lines = find_unmatched(rules, [name.replace("model.", "decoder.") for name in names])
    assert len(lines) == len(names)
    assert "nearest: decoder.layers.499" in lines[0]
    assert sum("nearest" in line for line in lines) == 3


def test_a_star_is_told_what_a_pattern_is() -> None:
    [line] = find_unmatched(skip_rules(["model.layers.*.mlp"]), ["model.layers.0.mlp"])
    pattern = line.rpartition("use re:")[2].rstrip(")")
    assert line.startswith("--skip 'model.layers.*.mlp' matches nothing (without re: it is a name")
    assert find_unmatched(skip_rules([f"re:{pattern}"]), ["model.layers.0.mlp"]) == []
