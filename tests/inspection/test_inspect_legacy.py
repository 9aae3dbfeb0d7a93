"""Real files by old torchao, diffusers and Quanto: the scheme, the writer and what loads them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aoconvert.inspection.compat import RELEASES, fits
from aoconvert.inspection.inspect import inspect

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy"
MEASURED: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "measured.json").read_text())
FOLDERS = sorted(path.parent.relative_to(LEGACY).as_posix() for path in LEGACY.glob("**/*.bin"))
QUANTO = sorted(path.parent.relative_to(LEGACY).as_posix() for path in LEGACY.glob("quanto/*/config.json"))

# Folder name of a fixture, by the one who made it -> scheme; the rest is in the config that made it (meta.json).
SCHEMES = {
    "int8wo": "int8wo",
    "int8wo_g32": "int8wo",
    "int8wo_v2": "int8wo",
    "int8dq": "int8dq",
    "int8dq_asym": "int8dq",
    "int8dq_v2": "int8dq",
    "int4dq_g32_asym": "int4dq",
    "int4a4w": "int4a4w",
    "int4wo_cpu_g32": "int4wo",
    "int4wo_tiled_g32": "int4wo",
    "int4wo_v2_opaque_g32": "int4wo",
    "int4x_pergroup32_v2": "intx4wo",
    "uint3wo_g64": "uint3wo",
    "uint4wo_g64": "uint4wo",
    "uint4wo_g64_hqq": "uint4wo",
    "float8wo_e4m3": "float8wo",
    "float8dq_e4m3_perrow": "float8dq",
    "float8dq_e4m3_pertensor": "float8dq",
    "float8dq_e4m3_perrow_v2": "float8dq_row",
    "fp6_e3m2": "fp6_e3m2",
    "nf4_b64": "nf4",
}

# Fixture -> releases that read it without an error and then compute something else (measured: dequantize fails).
LOADS_WRONG = {
    "torchao-0.10.0/float8wo_e4m3": ("0.12.0", "0.13.0", "0.14.1", "0.15.0", "0.16.0"),
    "diffusers-0.33.1-torchao-0.10.0/float8wo_e4m3": ("0.12.0", "0.13.0", "0.14.1", "0.15.0", "0.16.0"),
}

# What the class names alone say of the writer where that is one release.
EXACT = {
    "torchao-0.5.0/fp6_e3m2": "0.5",
    "torchao-0.5.0/uint4wo_g64": "0.5",
    "torchao-0.6.1/float8dq_e4m3_perrow": "0.6.1",
    "torchao-0.13.0/int4x_pergroup32_v2": "0.13",
    "torchao-0.14.1/int4wo_v2_opaque_g32": "0.14.1",
    "torchao-0.15.0/int8wo_v2": "0.15",
    "torchao-0.17.0/int8dq_v2": "0.17",
}


def writer(folder: str) -> str:
    """The torchao that wrote a fixture, by its folder's name."""
    match = re.search(r"torchao-(\d+\.\d+\.\d+)", folder)
    assert match
    return match[1]


def test_every_fixture_is_here() -> None:
    assert len(FOLDERS) == 29
    assert len(QUANTO) == 6


@pytest.mark.parametrize("folder", FOLDERS)
def test_scheme_and_kind(folder: str) -> None:
    found = inspect(str(LEGACY / folder))
    assert found.kind == "torchao"
    assert found.scheme == SCHEMES[folder.rpartition("/")[2]]
    assert not found.unsafe
    part = found.components[0]
    assert 0 < part.quantized_parameters < part.parameters
    meta = json.loads((LEGACY / folder / "meta.json").read_text())
    if "tensor0" in meta:  # what the old torchao said of its own first tensor
        assert part.tensor_classes[meta["tensor0"]["cls"]] == len(meta["quantized_keys"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_writer_is_in_the_range(folder: str) -> None:
    by = inspect(str(LEGACY / folder)).components[0].written_by
    places = [release.removesuffix(".0") for release in RELEASES]
    span = by["torchao_range"]
    assert places.index(span["min"]) <= RELEASES.index(writer(folder)) <= places.index(span["max"])
    assert "inferred" in by["how"]
    assert by["torchao"] == EXACT.get(folder)
    if folder.startswith("diffusers"):
        assert by["diffusers"] == "0.33.1"


@pytest.mark.parametrize("folder", FOLDERS)
def test_releases_that_load_it_are_those_that_did(folder: str) -> None:
    part = inspect(str(LEGACY / folder)).components[0]
    assert part.loading is not None
    file = next(key for key in MEASURED if key.startswith(f"{folder}/"))
    said = {release for release in RELEASES if fits(release, part.loading)}
    did = {release for release in RELEASES if MEASURED[file][release] != "no"}
    assert said == did - set(LOADS_WRONG.get(folder, ()))
    assert writer(folder) in said
    assert part.loading.best in said
    asked = MEASURED[file][part.loading.best]
    assert bool(part.loading.safe_globals) == (asked == "allow-list")
    assert bool(part.loading.imports) <= (asked != "import torchao")
    assert part.loading.why


def test_intx_before_it_had_a_class_of_its_own() -> None:
    """Made for this test by the torchao 0.13 wheel: ``IntxWeightOnlyConfig(weight_dtype=int4, PerGroup(32))``."""
    name = "inspection/torchao-0.13.0-intx4wo_v1.bin"
    found = inspect(str(LEGACY.parent / name))
    part = found.components[0]
    assert (found.scheme, found.loads_here, part.quantized_parameters) == ("intx4wo", False, 128 * 64)
    assert part.loading is not None
    said = {release for release in RELEASES if fits(release, part.loading)}
    assert said == {release for release, how in MEASURED[name].items() if how != "no"}
    assert (part.loading.minimum, part.loading.maximum) == ("0.11", "0.16")


def test_loads_here_is_what_torch_says() -> None:
    """``loads_here`` against a real ``torch.load(weights_only=True)`` of every fixture."""
    files = {folder: next((LEGACY / folder).glob("*.bin")) for folder in FOLDERS}
    script = (
        "import json, sys, torch, torchao, torchao.quantization\n"
        "seen = {}\n"
        "for name, path in json.load(sys.stdin).items():\n"
        "    try: torch.load(path, weights_only=True); seen[name] = True\n"
        "    except Exception: seen[name] = False\n"
        "print(json.dumps(seen))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        input=json.dumps({name: str(path) for name, path in files.items()}),
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=True,
    )
    truth: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    said = {folder: inspect(str(LEGACY / folder)).loads_here for folder in FOLDERS}
    assert said == truth
    assert sum(truth.values()) == 3  # the three v2 files


def test_what_to_do_when_it_cannot_be_loaded() -> None:
    found = inspect(str(LEGACY / "torchao-0.10.0" / "int8wo")).to_dict()
    assert found["loads_here"] is False
    assert "torchao 0.7 to 0.17" in found["why_not"]
    assert "AffineQuantizedTensor is not in torchao 0.18 or later" in found["why_not"]
    assert any("torchao==0.17.0" in line for line in found["advice"])
    assert any("--scheme int8wo" in line for line in found["advice"])


@pytest.mark.parametrize(
    ("folder", "verb"),
    [
        ("torchao-0.10.0/int8wo", "migrate"),
        ("diffusers-0.33.1-torchao-0.10.0/int8dq", "migrate"),
        ("torchao-0.14.1/int4wo_v2_opaque_g32", "migrate"),
        ("torchao-0.10.0/int4wo_cpu_g32", "migrate"),
        ("quanto/diffusers-int4", "migrate"),
        ("torchao-0.15.0/int8wo_v2", "verify"),
    ],
)
def test_it_ends_with_the_command_that_helps(folder: str, verb: str) -> None:
    """Which CPU packed int4 is not guessed: migrate names the choices."""
    path = str(LEGACY / folder)
    assert inspect(path).to_dict()["next"] == f"aoconvert {verb} {path}"


def test_config_by_name_is_a_problem_of_its_own() -> None:
    found = inspect(str(LEGACY / "diffusers-0.33.1-torchao-0.10.0" / "int8wo")).to_dict()
    assert "does not read the quant_type 'int8wo'" in found["why_not"]
    assert (found["library"], found["class"]) == ("diffusers", "PixArtTransformer2DModel")


@pytest.mark.parametrize(
    ("folder", "device", "capability"),
    [
        ("torchao-0.13.0/int4wo_tiled_g32", "cuda", [8, 0]),
        ("torchao-0.10.0/int4wo_cpu_g32", "cpu", None),
        ("torchao-0.14.1/int4wo_v2_opaque_g32", "cpu", None),
        ("torchao-0.10.0/int8wo", "any", None),
    ],
)
def test_layout_device(folder: str, device: str, capability: list[int] | None) -> None:
    found = inspect(str(LEGACY / folder)).to_dict()
    assert found["layout_device"] == device
    assert found["components"][0]["min_capability"] == capability
    if device == "cpu":
        assert any("depends on the machine" in line for line in found["advice"])


@pytest.mark.parametrize("folder", QUANTO)
def test_quanto(folder: str) -> None:
    found = inspect(str(LEGACY / folder)).to_dict()
    name = folder.rpartition("-")[2]
    assert found["kind"] == "quanto"
    assert found["scheme"] == {"float8": "quanto_float8_e4m3"}.get(name, f"quanto_{name}")
    assert found["class"] == "PixArtTransformer2DModel"
    assert found["loads_with"] == {"torchao": None, "packages": ["optimum-quanto"]}
    # the same model every time: packed values and scales count for what they stand for
    assert found["parameters"] == 72992
    direct = "direct" in folder
    assert found["quantized_parameters"] == (71424 if direct else 70656)
    assert any("leaves the weights on meta" in line for line in found["advice"]) == direct


@pytest.mark.parametrize("folder", [name for name in QUANTO if "direct" in name])
def test_quanto_without_its_map_is_known_by_its_keys(folder: str, tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
        (LEGACY / folder / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    found = inspect(str(tmp_path))
    assert (found.kind, found.scheme) == ("quanto", f"quanto_{folder.rpartition('-')[2]}")


def test_json_is_json(tmp_path: Path) -> None:
    keys: set[Any] = set()
    for folder in FOLDERS + QUANTO:
        found = json.loads(json.dumps(inspect(str(LEGACY / folder)).to_dict()))
        keys.add(tuple(sorted(found)))
    assert len(keys) == 1
