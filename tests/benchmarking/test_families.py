"""Every family of ``tests/table``: the result and its original are measured, and what cannot run on a CPU says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from table.families import FAMILIES, Checkpoints

import aoconvert

pytestmark = pytest.mark.exhaustive


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, tmp_path: Path) -> None:
    source = Checkpoints(tmp_path).source(family, wide=False)
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    report = aoconvert.bench(tmp_path / "out", source=str(source), runs=1, tokens=4, steps=1, offload=True)
    for row in report.rows:
        print(family, row.model, row.mode, row.unit, row.workload, row.model_bytes, row.error)
    plain = [row for row in report.rows if row.mode == "plain"]
    assert {row.model for row in plain} == {"result", "source"}
    assert [row.error for row in plain] == [None] * len(plain)
    for row in report.rows:
        if row.error is not None:
            reasons = ("fuse_qkv_projections", "requires accelerator", "is not a pipeline", "enable_vae_tiling")
            assert any(reason in row.error for reason in reasons), row.error
    sizes = {row.model: row.model_bytes for row in plain}
    assert sizes["result"] is not None and sizes["source"] is not None
    assert sizes["result"] < sizes["source"]
