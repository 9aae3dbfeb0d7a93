"""``--scheme auto`` on real weights and on a small Llama: what it promises, held against torchao's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import build_llama
from measuring import Weights, choice, size_of, size_on_disk

import aoconvert
from aoconvert.checkpoint.manifest import ComponentEntry
from aoconvert.errors import Interrupted
from aoconvert.progress import Silent
from aoconvert.recipes.rules import Rules
from aoconvert.searching.tensor_options import Survey


@pytest.fixture(scope="session")
def minilm(checkpoints: Callable[[str], Path]) -> Weights:
    return Weights(checkpoints("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 256}
    return Weights(build_llama(tmp_path_factory.mktemp("auto") / "llama", **shape))


@pytest.fixture(params=["llama", pytest.param("minilm", marks=pytest.mark.exhaustive)])
def weights(request: pytest.FixtureRequest) -> Weights:
    found: Weights = request.getfixturevalue(request.param)
    return found


def plan(weights: Weights, **options: Any) -> aoconvert.Plan:
    return aoconvert.plan(weights.folder, "auto", device="cpu", **options)


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("minilm", "int8wo"),
        pytest.param("minilm", "int4wo", marks=pytest.mark.exhaustive),
        pytest.param("minilm", "float8wo", marks=pytest.mark.exhaustive),
        ("llama", "int4wo"),
        ("llama", "int8wo"),
        ("llama", "float8wo"),
    ],
)
def test_a_size_is_reached_with_less_error_than_any_single_scheme_of_that_size_has(
    request: pytest.FixtureRequest, model: str, scheme: str
) -> None:
    weights: Weights = request.getfixturevalue(model)
    size, error = weights.singles[scheme]
    target = size + size // 50
    made = plan(weights, target_size=target)
    assert 0.99 * target <= size_of(made) <= target
    smaller = [noise for bytes_, noise in weights.singles.values() if bytes_ <= target]
    assert error in smaller
    assert weights.total(made) < min(smaller)
    assert not [line for line in made.warnings if "target" in line]


def test_at_the_size_of_a_worse_scheme_it_is_far_better(weights: Weights) -> None:
    size, error = weights.singles["float8wo"]
    made = plan(weights, target_size=size)
    assert size_of(made) <= size
    assert weights.total(made) < error / 2


def test_what_was_planned_is_written_and_made_again_without_a_search(weights: Weights, tmp_path: Path) -> None:
    target = (weights.singles["int4wo"][0] + weights.singles["int8wo"][0]) // 2
    planned = plan(weights, target_size=target, output=tmp_path / "one")
    first = aoconvert.quantize(weights.folder, "auto", target_size=target, device="cpu", output=tmp_path / "one")
    assert 0.99 * target <= size_on_disk(tmp_path / "one") <= target
    (part,) = first.manifest.components
    assert {t.name: t.scheme for t in part.tensors if t.name in choice(planned)} == choice(planned)
    assert len({tensor.scheme for tensor in part.tensors if tensor.scheme}) > 1
    assert part.config["_type"] == "FqnToConfig"
    # the error that was measured is the one that was written
    for tensor in part.tensors:
        if tensor.scheme is not None:
            assert tensor.sqnr_db == pytest.approx(weights.sqnr(tensor.name, tensor.scheme), abs=2e-3)
    config = tmp_path / "one" / "config.json"
    again = aoconvert.quantize(weights.folder, recipe=config, device="cpu", output=tmp_path / "two")
    (other,) = again.manifest.components
    assert hashes(other) == hashes(part)
    assert len(hashes(part)) == 1


def hashes(part: ComponentEntry) -> dict[str, str]:
    return {file.path: file.sha256 for file in part.files if file.path.endswith(".bin")}


def expected(weights: Weights, name: str, candidates: list[str], limit: float) -> str | None:
    """The smallest candidate that is good enough; they come smallest first."""
    return next((scheme for scheme in candidates if weights.sqnr(name, scheme) >= limit), None)


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [("llama", 19.98, 43.45), pytest.param("minilm", 19.6, 41.5, marks=pytest.mark.exhaustive)],
)
def test_each_tensor_has_the_smallest_scheme_with_the_sqnr_that_was_asked_for(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, low: float, high: float
) -> None:
    weights: Weights = request.getfixturevalue(model)
    candidates = ["int4wo", "int4wo-32", "float8wo", "int8wo"]
    options: dict[str, Any] = {"candidates": candidates, "device": "cpu", "min_quantized": 0.0}
    found = set()
    for limit in (low, high):
        made = aoconvert.quantize(weights.folder, "auto", min_sqnr=limit, output=tmp_path / f"{limit}", **options)
        for tensor in made.manifest.components[0].tensors:
            if tensor.name not in weights.matrices:
                continue
            wanted = expected(weights, tensor.name, candidates, limit)
            found.add(wanted)
            if wanted is None:
                assert tensor.scheme is None
                assert tensor.reason == f"auto: no candidate reaches {limit:g} dB"
            else:
                assert tensor.scheme == wanted.removesuffix("-32")
                assert tensor.sqnr_db is not None
                assert tensor.sqnr_db >= limit, tensor.name
    assert found == {"int4wo", "int4wo-32", "int8wo", None}


def test_target_bits_is_kept_for_each_component_alone(checkpoints: Callable[[str], Path], llama: Weights) -> None:
    made = plan(llama, target_bits=9.0)
    assert 0.99 * 9.0 <= made.components[0].totals.bits_per_weight <= 9.0
    pipeline = aoconvert.plan(
        checkpoints("cogvideox"),
        "auto",
        target_bits=12.0,
        components=["transformer", "text_encoder"],
        device="cpu",
        min_quantized=0.0,
    )
    assert len(pipeline.components) == 2
    for part in pipeline.components:
        assert part.totals.bits_per_weight <= 12.0


def test_a_component_with_a_scheme_of_its_own_counts_but_is_not_chosen_for(
    checkpoints: Callable[[str], Path],
) -> None:
    source = checkpoints("cogvideox")
    options: dict[str, Any] = {"device": "cpu", "components": {"transformer": None, "text_encoder": "float8wo"}}
    full = aoconvert.plan(source, "int8wo", **options)
    target = int(1.2 * size_of(full))
    made = aoconvert.plan(source, "auto", target_size=target, min_quantized=0.0, **options)
    encoder = next(part for part in made.components if part.component.name == "text_encoder")
    assert [scheme.name for scheme in encoder.schemes] == ["float8wo"]
    assert size_of(full) < size_of(made) <= target


def test_the_choice_is_the_same_again(llama: Weights) -> None:
    size, _ = llama.singles["int8wo"]
    first = choice(plan(llama, target_size=int(0.9 * size)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert choice(plan(llama, target_size=int(0.9 * size))) == first
    finally:
        torch.set_num_threads(threads)
    assert len(set(first.values())) > 2


def test_what_is_skipped_is_not_chosen_for_and_every_reason_is_kept(llama: Weights) -> None:
    made = plan(llama, target_bits=9.0, skip=["re:.*down_proj"], min_quantized=0.0)
    reasons = {tensor.name: tensor.reason for tensor in made.components[0].tensors}
    assert reasons["model.layers.0.mlp.down_proj.weight"] == "--skip re:.*down_proj"
    assert reasons["lm_head.weight"] == "output head"
    assert reasons["model.embed_tokens.weight"] == "an embedding table"
    assert not any(reason and "no rule" in reason for name, reason in reasons.items() if name.endswith("proj.weight"))


def test_min_quantized_is_kept_where_the_size_alone_would_not(llama: Weights) -> None:
    target = int(0.85 * sum(tensor.nbytes for tensor in llama.tensors.values()))
    alone = plan(llama, target_size=target, min_quantized=0.0)
    assert alone.components[0].totals.quantized_fraction < 0.5
    assert size_of(alone) >= 0.99 * target
    made = plan(llama, target_size=target)
    assert 0.5 <= made.components[0].totals.quantized_fraction < 0.6
    assert size_of(made) < target
    assert [line for line in made.warnings if "is the closest value below it that was found" in line]


def test_experts_are_chosen_for_too(checkpoints: Callable[[str], Path]) -> None:
    source, options = checkpoints("mixtral"), {"device": "cpu", "min_quantized": 0.0}
    single = aoconvert.plan(source, "int8wo", **options)
    names = {t.name for t in single.components[0].tensors if ".experts." in t.name and t.scheme is not None}
    assert names
    target = int(1.3 * size_of(single))
    made = aoconvert.plan(source, "auto", target_size=target, candidates=["float8wo", "int8wo"], **options)
    assert 0.95 * target <= size_of(made) <= target
    experts = {t.name: t.scheme for t in made.components[0].tensors if t.name in names}
    assert any(scheme is not None for scheme in experts.values())
    assert any(t.scheme is None and (t.reason or "").startswith("auto: ") for t in made.components[0].tensors)


def test_what_cannot_be_had_together_is_chosen_again(llama: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that could be multiplied one by one only; no model here has two schemes that exclude each other."""
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(survey: Survey, rules: Rules) -> list[str]:
        return [rule.pattern for rule in rules.rules if rule.pattern == name and rule.scheme is not None]

    before = choice(plan(llama, target_bits=9.0))
    assert before[name] is not None
    monkeypatch.setattr(Survey, "refused", refused)
    made = plan(llama, target_bits=9.0)
    assert choice(made)[name] is None
    assert 0.99 * 9.0 <= made.components[0].totals.bits_per_weight <= 9.0


def test_a_run_that_was_stopped_goes_on_with_the_same_choice(llama: Weights, tmp_path: Path) -> None:
    class Stopping(Silent):
        stage = ""
        left = 12

        def start(self, stage: str, total_bytes: int) -> None:
            self.stage = stage

        def advance(self, nbytes: int, current: str = "") -> None:
            self.left -= self.stage == "quantize"
            if not self.left:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"target_size": int(0.9 * llama.singles["int8wo"][0]), "device": "cpu"}
    with pytest.raises(Interrupted):
        aoconvert.quantize(llama.folder, "auto", output=tmp_path / "one", progress=Stopping(), **options)
    resumed = aoconvert.quantize(llama.folder, "auto", output=tmp_path / "one", **options)
    assert resumed.resumed >= 10
    fresh = aoconvert.quantize(llama.folder, "auto", output=tmp_path / "two", **options)
    assert hashes(resumed.manifest.components[0]) == hashes(fresh.manifest.components[0])


def test_a_candidate_that_the_format_cannot_hold_is_left_out(tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", hidden_size=128, intermediate_size=320, vocab_size=64)
    plan = aoconvert.plan(
        source,
        "auto",
        output=tmp_path / "out",
        device="cpu",
        format="safetensors",
        candidates=["int4wo", "int8wo"],
        target_bits=9,
        layout_device="cpu",
        min_quantized=0.0,
    )
    [part] = plan.components
    assert {scheme.name for scheme in part.schemes} == {"int8wo"}
    [line] = [line for line in plan.warnings if "auto leaves out" in line]
    assert line.startswith("LlamaForCausalLM: auto leaves out int4wo for 12 tensors: safetensors files cannot hold it")
    assert "Int4OpaqueTensor" in line
