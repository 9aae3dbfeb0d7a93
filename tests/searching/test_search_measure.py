"""The pass over the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import LLAMA, build_llama, llama_tensors
from helpers.one_tensor import quantize_tensor

from aoconvert import schemes
from aoconvert.engine import stream
from aoconvert.engine.block_quantizer import BlockQuantizer
from aoconvert.engine.quantizer import Quantizer
from aoconvert.errors import AoconvertError, QuantizeError
from aoconvert.options import QuantizeOptions
from aoconvert.planning import Plan, slices
from aoconvert.planning.build import build_plan
from aoconvert.progress import Silent
from aoconvert.schemes import Scheme
from aoconvert.schemes.error_stats import ErrorStats
from aoconvert.searching.measure import measure
from aoconvert.sources import resolve

NAMES = ("int8wo", "float8wo", "intx4wo")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("measure") / "llama")


def planned(folder: Path) -> tuple[Plan, dict[str, list[Scheme]]]:
    made = build_plan(
        resolve(str(folder)), QuantizeOptions(scheme="int8wo", device="cpu", output=folder.parent / "out")
    )
    candidates = [schemes.get(name, group_size=32 if name.startswith("intx") else None) for name in NAMES]
    return made, {t.name: candidates for t in made.components[0].tensors if t.scheme is not None}


def compare(found: Mapping[str, Mapping[str, ErrorStats]], wanted: Mapping[str, list[Scheme]]) -> None:
    weights = llama_tensors(LLAMA)
    assert found.keys() == wanted.keys()
    for name, candidates in wanted.items():
        assert found[name].keys() == {scheme.key for scheme in candidates}
        for scheme in candidates:
            expected = quantize_tensor(name, weights[name], torch.bfloat16, scheme, "cpu")
            measured = found[name][scheme.key]
            assert (measured.sqnr_db, measured.largest) == (expected.sqnr_db, expected.max_abs_error)


@pytest.mark.parametrize("on_lanes", [False, True])
def test_every_candidate_gets_the_error_that_the_engine_would_write(
    llama: Path, monkeypatch: pytest.MonkeyPatch, on_lanes: bool
) -> None:
    """In pieces of some rows, and on lanes, as on a GPU, several at once."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 3000)
    if on_lanes:

        def on_lanes_too(*arguments: Any) -> Quantizer:
            made = Quantizer(*arguments)
            made._gpus = [BlockQuantizer("cpu"), BlockQuantizer("cpu")]
            return made

        monkeypatch.setattr(stream, "Quantizer", on_lanes_too)
    made, wanted = planned(llama)
    compare(measure(made, made.components[0], wanted, Silent()).errors, wanted)


def test_progress_ends_at_the_bytes_that_are_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Silent):
        done = 0

        def advance(self, nbytes: int, current: str = "") -> None:
            self.done += nbytes

    monkeypatch.setattr(slices, "SLICE_BYTES", 1000)
    made, wanted = planned(llama)
    progress = Counting()
    measure(made, made.components[0], wanted, progress)
    assert progress.done == sum(t.bytes_in for t in made.components[0].tensors if t.name in wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(tmp_path: Path, value: float) -> None:
    tensors = llama_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    made, wanted = planned(build_llama(tmp_path / "llama", tensors=tensors))
    with pytest.raises(QuantizeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        measure(made, made.components[0], wanted, Silent())


def test_what_torchao_fails_on_is_left_out_and_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that do not divide the columns: the shape's check would have kept them from here."""
    made, wanted = planned(llama)
    name = next(iter(wanted))
    bad = schemes.get("intx4wo", group_size=48)
    measured = measure(made, made.components[0], {**wanted, name: [*wanted[name], bad]}, Silent())
    assert bad.key not in measured.errors[name]
    assert len(measured.errors[name]) == len(NAMES)
    (line,) = measured.failures
    assert line.startswith(f"auto does not consider intx4wo for {name}: ")
    assert "\n" not in line


def test_a_reader_that_fails_ends_the_pass(llama: Path, tmp_path: Path) -> None:
    folder = build_llama(tmp_path / "llama")
    made, wanted = planned(folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(AoconvertError, match=r"model\.safetensors"):
        measure(made, made.components[0], wanted, Silent())
