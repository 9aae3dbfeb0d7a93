"""``aoconvert schemes``: what the catalogue, torchao and this machine say."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aoconvert import schemes
from aoconvert.schemes import hardware

ROOT = Path(__file__).parents[2]


def test_every_scheme_has_a_size_and_its_demands(call: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in json.loads(call("schemes", "--json").stdout)}
    assert list(rows) == [entry.name for entry in schemes.catalogue()]
    for name, row in rows.items():
        made = schemes.get(name)
        assert row["bytes_per_parameter"] == round(made.format.bytes_per_parameter, 2)
        assert (row["granularity"], row["activation_dtype"]) == (made.format.granularity, made.format.activation)
        assert (row["ranks"], row["from_dtypes"]) == (list(made.ranks), list(made.entry.dtypes))
        assert set(row["notes"]) <= set(made.notes)
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
    assert "not yet compared" in layouts["cuda"]["unconfirmed"]


def test_one_scheme_in_words(call: Callable[..., Any]) -> None:
    shown = call("schemes", "int4wo-64").stdout
    for text in ("per group of 128", "0.53 bytes per parameter", "for cuda", "unconfirmed", "choose it"):
        assert text in shown
    assert call("schemes", "fp8dq", "-q").stdout == "float8dq\n"
    assert call("schemes", "auto").code == 2


OLD, HOPPER, BLACKWELL = (
    hardware.Gpu("an old GPU", (8, 6)),
    hardware.Gpu("a Hopper", (9, 0)),
    hardware.Gpu("a Blackwell", (10, 0)),
)


@pytest.mark.parametrize(
    ("device", "capability", "gpus", "reason"),
    [
        ("any", None, (), None),
        ("any", (8, 9), (), None),
        ("any", (8, 9), (OLD,), "it needs compute capability 8.9, an old GPU has 8.6"),
        ("any", (8, 9), (OLD, HOPPER), None),
        ("cuda", (10, 0), (HOPPER,), "it needs compute capability 10.0, a Hopper has 9.0"),
        ("cuda", (10, 0), (BLACKWELL,), None),
        ("cuda", None, (OLD,), None),
        ("cuda", (8, 0), (), "it needs a CUDA device, and torch sees none here"),
        ("cpu", None, (BLACKWELL,), None),
    ],
)
def test_what_runs_on_which_device(
    device: str,
    capability: tuple[int, int] | None,
    gpus: tuple[hardware.Gpu, ...],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: gpus)
    assert hardware.cannot_run(device, capability) == reason


def test_what_the_driver_says() -> None:
    text = "9.0, NVIDIA H100 80GB HBM3\n10.0, NVIDIA B200\n[N/A], unknown\nFailed to initialize NVML\n"
    assert hardware.parse(text) == (hardware.Gpu("NVIDIA H100 80GB HBM3", (9, 0)), hardware.Gpu("NVIDIA B200", (10, 0)))


@pytest.mark.gpu
def test_the_driver_and_torch_see_the_same_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert torch.cuda.get_device_capability() in [gpu.capability for gpu in hardware.gpus()]


def test_the_list_fits_a_screen(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("schemes").stdout.splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    shown = {line.split()[0] for line in lines[1:-1]}
    assert {"int8wo", "float8dq_row", "intx{1-8}wo", "uint{1-8}wo", "int8dq_int{1-8}"} <= shown
    folded = next(line for line in lines if line.startswith("intx{1-8}wo"))
    assert folded.endswith("1- to 8-bit values, one per byte")
    everything = call("schemes", "--all").stdout
    for entry in schemes.catalogue():
        assert any(line.startswith(f"{entry.name} ") and entry.summary in line for line in everything.splitlines())
    wide = json.loads(call("schemes", "--json").stdout)
    assert len(wide) == len(schemes.catalogue())


@pytest.mark.parametrize(
    ("typed", "expected", "not_expected"),
    [
        ("schemes flo", {"float8wo", "float8dq_row"}, {"int8wo"}),
        ("quantize ./model --scheme int4", {"int4wo", "int4dq"}, {"auto", "int8wo"}),
        ("plan ./model --scheme a", {"auto"}, {"int8wo"}),
        ("plan ./model --candidates int8wo,int", {"int8wo,int4wo"}, {"int8wo,int8wo"}),
        ("plan ./model --component t", {"transformer"}, {"vae", "tokenizer"}),
        ("plan ./model --component transformer=float8wo", {"transformer=float8wo_e5m2"}, {"transformer=int8wo"}),
        ("ca", {"cache", "card"}, {"plan"}),
    ],
)
def test_a_shell_completes(typed: str, expected: set[str], not_expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    parts = {"_class_name": "X", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"], "tokenizer": ["x", "Y"]}
    for name in ("transformer", "vae"):
        (tmp_path / "model" / name).mkdir()
        (tmp_path / "model" / name / "config.json").write_text("{}")
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(parts))
    words = f"aoconvert {typed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_AOCONVERT_COMPLETE": "bash_complete"}
    environment |= {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys; from aoconvert.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    found = {line.partition(",")[2] for line in done.stdout.splitlines()}
    assert expected <= found, done
    assert not not_expected & found
