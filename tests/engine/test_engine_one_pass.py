"""Several consumers of one pass: the source is read once, and each makes what it makes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import aoconvert
from aoconvert.engine import read_ahead
from aoconvert.engine.conversion import Conversion
from aoconvert.engine.read import ComponentReading
from aoconvert.engine.resume import Journal
from aoconvert.engine.staging import Stage
from aoconvert.engine.stream import stream
from aoconvert.errors import QuantizeError, WriteError
from aoconvert.formats.digest import Mark
from aoconvert.options import QuantizeOptions
from aoconvert.planning import Plan, slices
from aoconvert.planning.build import build_plan
from aoconvert.planning.inventory import Readable
from aoconvert.progress import Silent
from aoconvert.searching.measure import Measuring
from aoconvert.sources import resolve

SCHEMES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "rows": ("int8wo", {}),
    "whole": ("float8wo", {"granularity": "per_tensor"}),
    "groups": ("mxfp8", {}),
}


class Counted:
    """Counts the bytes of tensors that are read."""

    def __init__(self, reading: ComponentReading) -> None:
        self._reading = reading
        self.nbytes = 0

    def read(self, tensor: Readable, rows: tuple[int, int] | None, into: torch.Tensor | None) -> torch.Tensor:
        data = self._reading.read(tensor, rows, into)
        self.nbytes += data.nbytes
        return data

    def codes(self, tensor: Readable, rows: tuple[int, int] | None) -> Mapping[str, torch.Tensor] | None:
        return self._reading.codes(tensor, rows)

    def marks(self) -> Mapping[str, Mark]:
        return self._reading.marks()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices of a tiny model, some results too large for the memory."""
    for module in (slices, read_ahead):
        monkeypatch.setattr(module, "SLICE_BYTES", 1 << 12)
    monkeypatch.setattr(slices, "WHOLE_BYTES", 1 << 13)


def options(kind: str, output: Path) -> QuantizeOptions:
    name, settings = SCHEMES[kind]
    return QuantizeOptions(name, output=output, settings=settings, device="cpu", min_quantized=0)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.bin"))}


def opened(stack: ExitStack, plan: Plan, stage: Stage) -> Journal:
    journal = Journal(plan, stage)
    stack.callback(stage.discard)
    stack.callback(journal.close)
    journal.open(False, Silent())
    return journal


@pytest.mark.usefixtures("small")
def test_two_schemes_and_a_measurement_from_one_pass(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source, kinds = checkpoints("opt"), tuple(SCHEMES)
    plans = {kind: build_plan(resolve(str(source)), options(kind, tmp_path / kind)) for kind in kinds}
    with ExitStack() as stack:
        stages = {kind: Stage(plan.output) for kind, plan in plans.items()}
        conversions = {
            kind: Conversion(plan.components[0], opened(stack, plan, stages[kind]), Silent())
            for kind, plan in plans.items()
        }
        matrices = {t.name: t for t in plans["rows"].components[0].tensors if t.scheme is not None}
        measuring = Measuring({name: [tensor] for name, tensor in matrices.items()}, Silent())
        first = plans["rows"]
        reading = stack.enter_context(ComponentReading(first.components[0], first, tmp_path))
        counted = Counted(reading)
        stream(counted, [*conversions.values(), measuring], ("cpu",), allow_cpu=False)
        digests = reading.digests()
        written = {kind: weights(stages[kind].root) for kind in kinds}
    assert counted.nbytes == sum(tensor.bytes_in for tensor in first.components[0].tensors if tensor.is_written)
    for kind in kinds:
        name, settings = SCHEMES[kind]
        alone = aoconvert.quantize(
            source, name, output=tmp_path / f"{kind}-alone", settings=settings, device="cpu", min_quantized=0
        )
        assert written[kind] == weights(alone.output)
        assert digests == {file.path: file.sha256 for file in alone.manifest.source.files}
        made = {tensor.name: tensor for tensor in alone.manifest.components[0].tensors}
        results = conversions[kind].result.tensors
        assert {key: value.sqnr_db for key, value in results.items()} == {key: made[key].sqnr_db for key in results}
        if kind == "rows":
            errors = {key: error.sqnr_db for key, found in measuring.result.errors.items() for error in found.values()}
            assert errors == {key: made[key].sqnr_db for key in matrices}


@pytest.mark.usefixtures("small")
def test_one_that_fails_ends_the_pass(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Its error is raised, whichever consumer it is of, and every thread ends."""
    source = checkpoints("opt")
    plans = [build_plan(resolve(str(source)), options(kind, tmp_path / kind)) for kind in ("rows", "groups")]
    with ExitStack() as stack:
        stages = [Stage(plan.output) for plan in plans]
        journals = [opened(stack, plan, stage) for plan, stage in zip(plans, stages, strict=True)]
        conversions = [Conversion(p.components[0], j, Silent()) for p, j in zip(plans, journals, strict=True)]
        (stages[1].root / plans[1].components[0].files[0].path).mkdir()  # where its file should be
        with ComponentReading(plans[0].components[0], plans[0], tmp_path) as reading, pytest.raises(WriteError):
            stream(reading, conversions, ("cpu",), allow_cpu=False)


def test_a_weight_that_is_at_fault_ends_the_pass(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    class Broken(Counted):
        def read(self, tensor: Readable, rows: tuple[int, int] | None, into: torch.Tensor | None) -> torch.Tensor:
            data = super().read(tensor, rows, into)
            return data.fill_(torch.nan) if data.is_floating_point() else data

    plan = build_plan(resolve(str(checkpoints("opt"))), options("rows", tmp_path / "out"))
    with ExitStack() as stack:
        conversion = Conversion(plan.components[0], opened(stack, plan, Stage(plan.output)), Silent())
        reading = stack.enter_context(ComponentReading(plan.components[0], plan, tmp_path))
        with pytest.raises(QuantizeError, match="NaN"):
            stream(Broken(reading), [conversion], ("cpu",), allow_cpu=False)
