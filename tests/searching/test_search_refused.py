"""What ``auto`` cannot do: one line, and what to do next; nothing is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import LLAMA, build_llama, llama_tensors, write_config

import aoconvert
from aoconvert.errors import AoconvertError, PlanError, QuantizeError, UsageError
from aoconvert.searching import candidates


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("refused") / "llama")


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., AoconvertError]:
    def run(source: Path, **options: Any) -> AoconvertError:
        found = []
        for call in (aoconvert.plan, aoconvert.quantize):
            with pytest.raises(AoconvertError) as caught:
                call(source, "auto", device="cpu", output=tmp_path / "out", **options)
            found.append(caught.value)
            assert "\n" not in caught.value.message
            assert not list(tmp_path.glob("*out*"))
        assert found[0].message == found[1].message
        return found[0]

    return run


def test_an_unknown_candidate(llama: Path, refused: Callable[..., AoconvertError]) -> None:
    error = refused(llama, target_bits=8.0, candidates=["int8wo", "int9zz"])
    assert isinstance(error, UsageError)
    assert "int9zz" in error.message
    assert isinstance(refused(llama, target_bits=8.0, candidates="auto"), UsageError)


def test_candidates_for_two_devices(llama: Path, refused: Callable[..., AoconvertError]) -> None:
    error = refused(llama, target_bits=8.0, candidates=["int4wo", "float8dq_block"], layout_device="cpu")
    assert isinstance(error, UsageError)
    assert "cpu and cuda" in error.message


@pytest.mark.parametrize("options", [{"target_size": "1GB"}, {"target_bits": 16.0}])
def test_a_goal_above_the_model_as_it_is(
    llama: Path, refused: Callable[..., AoconvertError], options: dict[str, Any]
) -> None:
    error = refused(llama, **options)
    assert isinstance(error, PlanError)
    assert "does not limit anything: with nothing quantized it takes" in error.message


@pytest.mark.parametrize("options", [{"target_size": 1000}, {"target_bits": 1.0}])
def test_a_goal_out_of_reach_says_what_can_be_reached(
    llama: Path, refused: Callable[..., AoconvertError], options: dict[str, Any]
) -> None:
    error = refused(llama, **options)
    assert isinstance(error, PlanError)
    assert "cannot be reached: the result takes at least" in error.message
    (flag,) = options
    if flag == "target_size":  # what it says is true
        least = int(error.message.split("(")[1].split(" bytes")[0])
        made = aoconvert.plan(llama, "auto", target_size=least, device="cpu")
        assert sum(file.size for file in made.components[0].files) == least
        with pytest.raises(PlanError):
            aoconvert.plan(llama, "auto", target_size=least - 1, device="cpu")


def test_a_config_without_weights(tmp_path: Path, refused: Callable[..., AoconvertError]) -> None:
    folder = tmp_path / "config-only"
    write_config(folder, LLAMA)
    error = refused(folder, min_sqnr=20.0)
    assert isinstance(error, PlanError)
    assert "--scheme auto measures the weights, but config-only has none" in error.message


def test_every_component_has_a_scheme(
    checkpoints: Callable[[str], Path], refused: Callable[..., AoconvertError]
) -> None:
    error = refused(checkpoints("cogvideox"), min_sqnr=20.0, components={"transformer": "int8wo"})
    assert isinstance(error, UsageError)
    assert "nothing to choose" in error.message


def test_nan_in_the_source(tmp_path: Path, refused: Callable[..., AoconvertError]) -> None:
    tensors = llama_tensors(LLAMA)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    folder = build_llama(tmp_path / "nan", tensors=tensors)
    error = refused(folder, target_bits=9.0)
    assert isinstance(error, QuantizeError)
    assert error.message.startswith("model.layers.0.self_attn.q_proj.weight holds NaN or infinity")


def test_an_sqnr_that_nothing_has(llama: Path, refused: Callable[..., AoconvertError]) -> None:
    error = refused(llama, min_sqnr=200.0)
    assert isinstance(error, PlanError)
    assert "auto would quantize 0% of" in error.message
    assert "auto: no candidate reaches 200 dB" in error.message


def test_no_candidate_fits_any_shape(llama: Path, refused: Callable[..., AoconvertError]) -> None:
    error = refused(llama, min_sqnr=10.0, candidates="int4wo")  # 64 and 160 columns, groups of 128
    assert isinstance(error, PlanError)
    assert "nothing is left to quantize" in error.message


def test_an_output_that_is_in_use(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "full")
    options: dict[str, Any] = {"target_bits": 12.0, "device": "cpu", "output": tmp_path / "full"}
    with pytest.raises(PlanError, match="exists and is not empty"):
        aoconvert.quantize(llama, "auto", **options)
    plan = aoconvert.plan(llama, "auto", **options)  # which writes nothing
    assert any("exists and is not empty" in line for line in plan.warnings)


def test_the_default_candidates_are_those_that_can_be_made() -> None:
    for device, first in (("cpu", "opaque"), ("cuda", "tile_packed_to_4d"), ("xpu", "plain_int32")):
        found = candidates.resolve((), device)
        assert found[0].name == "int4wo"
        assert found[0].layout.packing.startswith(first)
        assert {scheme.name for scheme in found} == set(candidates.DEFAULT)


def test_a_candidate_that_is_named_twice_counts_once() -> None:
    found = candidates.resolve(("int8wo", "INT8_weight_only", "int4wo-64", "int4wo"), "cpu")
    assert [(scheme.name, scheme.group_size) for scheme in found] == [("int4wo", 128), ("int4wo", 64), ("int8wo", None)]
