"""``aoconvert schemes``: what the catalogue, torchao and this machine say."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from aoconvert import schemes
from aoconvert.environment import Device
from aoconvert.schemes import Layout, here


def test_every_scheme_has_a_size_and_its_demands(call: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in json.loads(call("schemes", "--json").stdout)}
    assert list(rows) == [entry.name for entry in schemes.catalogue()]
    for name, row in rows.items():
        made = schemes.get(name)
        assert row["bytes_per_parameter"] == round(made.bytes_per_parameter, 4)
        assert (row["granularity"], row["activation_dtype"]) == (made.granularity, made.activation)
        assert row["summary"]
        assert row["source"]
        assert row["quantizes_here"]
    assert rows["float8dq"]["min_capability"] == [8, 9]
    assert rows["mxfp8"]["device"] == "cuda"
    assert rows["int8wo"]["layouts"] == []
    layouts = {layout["layout_device"]: layout for layout in rows["int4wo"]["layouts"]}
    assert list(layouts) == ["cpu", "cuda", "xpu", "plain"]
    assert layouts["cpu"]["quantizes_here"]
    assert layouts["cpu"]["unconfirmed"] is None
    assert "confirmed" in layouts["cuda"]["unconfirmed"]


def test_one_scheme_in_words(call: Callable[..., Any]) -> None:
    shown = call("schemes", "int4wo-64").stdout
    for text in ("per group of 64", "0.5625 bytes a parameter", "for cuda", "unconfirmed", "choose it"):
        assert text in shown
    assert call("schemes", "fp8dq", "-q").stdout == "float8dq\n"
    assert call("schemes", "auto").code == 2


@pytest.mark.parametrize(
    ("layout", "device", "reason"),
    [
        (Layout("any", "plain", None, ()), None, None),
        (Layout("any", "plain", (8, 9), ()), Device("cpu", "a CPU", None), None),
        (Layout("any", "plain", (8, 9), ()), Device("cuda", "an old GPU", (8, 6)), "8.9, an old GPU has 8.6"),
        (Layout("any", "plain", (8, 9), ()), Device("cuda", "a GPU", (9, 0)), None),
        (Layout("cuda", "swizzled", (10, 0), ()), Device("cuda", "a GPU", (9, 0)), "10.0, a GPU has 9.0"),
        (Layout("cuda", "swizzled", (10, 0), ()), Device("cuda", "a GPU", (10, 0)), None),
        (Layout("cuda", "swizzled", (10, 0), ()), None, "needs a cuda device"),
        (Layout("cpu", "opaque_avx2", None, ()), None, None),
    ],
)
def test_what_runs_on_which_device(
    layout: Layout, device: Device | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "_device", lambda requested: device or (None if requested != "auto" else _CPU))
    found = here.cannot_run(layout)
    assert (found is None) if reason is None else reason in (found or "")


_CPU = Device("cpu", "a CPU", None)
