"""The program writes what it always wrote: a few conversions by default, all on demand; ``run.py`` keeps the hashes."""

from __future__ import annotations

import pytest
import torch
from golden import run
from golden.conversions import CONVERSIONS, Golden, differences, facts
from table.run import quiet

STORED = run.stored()

# a pipeline with fused weights and parts that are taken over; ties; weights in .bin; shards; experts and carried
# tensors; a packed layout
USUAL = {"flux-fused", "llama-tied", "llama-bin-shards", "llama-shards-out", "glm-prediction", "llama-int4-cuda"}


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    quiet()
    return Golden(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in USUAL else [pytest.mark.exhaustive]) for name in CONVERSIONS]
)
def test_the_result_is_the_same_to_the_byte(name: str, golden: Golden) -> None:
    if run.versions() != STORED["versions"]:
        pytest.skip(f"the bytes are of {STORED['versions']}, installed are {run.versions()}")
    wanted = CONVERSIONS[name].cpu
    if wanted is not None and wanted != (found := torch.backends.cpu.get_cpu_capability()):
        pytest.skip(f"its layout is for {wanted}, this CPU has {found}")
    differ = differences(golden.make(name), STORED["conversions"][name])
    assert not differ, "\n".join([*differ, "meant? python tests/golden/run.py --write"])


def test_every_conversion_is_stored() -> None:
    assert set(STORED["conversions"]) == set(CONVERSIONS)
    assert set(CONVERSIONS) >= USUAL


def test_what_differs_is_named() -> None:
    wanted = {"files": {"a": "1", "b": "2"}, "documents": {"plan": "3"}}
    found = {"files": {"a": "1", "c": "2"}, "documents": {"plan": "4"}}
    assert differences(wanted, wanted) == []
    assert differences(found, wanted) == ["b is missing or new", "c is missing or new", "plan differs"]


def test_facts_and_sentences_are_apart_and_in_order() -> None:
    document = {"a": 1, "parts": [{"reason": "too small", "b": 2}], "run": {"seconds": 3.0}}
    titles = facts("plan", document)
    assert facts("plan", {**document, "run": {"seconds": 4.0}}) == titles
    assert facts("plan", {**document, "parts": [{"reason": "small", "b": 2}]})["plan"] == titles["plan"]
    assert facts("plan", {**document, "parts": [{"reason": "small", "b": 2}]}) != titles
    assert facts("plan", dict(reversed(document.items())))["plan"] != titles["plan"]
    assert facts("plan", {**document, "c": None})["plan"] != titles["plan"]
