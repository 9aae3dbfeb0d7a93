"""What this torchao and aoconvert itself write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aoconvert
from aoconvert.environment import import_torchao, version_of
from aoconvert.formats.torch_bin.header import read_bin
from aoconvert.inspection.compat import RELEASES, fates, find_loading, fits
from aoconvert.inspection.inspect import inspect

MEASURED: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "measured.json").read_text())
# What a release before these reads without an error and then computes wrongly or misses fields.
RIGHT_SINCE = {"int8wo_g32": "0.17.0", "int8dq_asym": "0.17.0", "mx": "0.16.0", "nvfp4wo": "0.16.0"}


def configs() -> dict[str, tuple[Any, str]]:
    """Name in ``measured.json`` -> torchao config and scheme."""
    import_torchao()
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )
    from torchao.quantization.quant_primitives import MappingType

    return {
        "int8wo": (Int8WeightOnlyConfig(), "int8wo"),
        "int8wo_g32": (Int8WeightOnlyConfig(granularity=PerGroup(32)), "int8wo"),
        "int8dq": (Int8DynamicActivationInt8WeightConfig(), "int8dq"),
        "int8dq_asym": (Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC), "int8dq"),
        "fp8wo": (Float8WeightOnlyConfig(), "float8wo"),
        "fp8wo_e5m2": (Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2), "float8wo_e5m2"),
        "intx4": (IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), "intx4wo"),
        "int4dq": (
            Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
            "int4dq",
        ),
        "mx": (MXDynamicActivationMXWeightConfig(), "mxfp8"),
        "nvfp4wo": (NVFP4WeightOnlyConfig(), "nvfp4wo"),
    }


def runs_here(name: str) -> bool:
    """mxfp8 is multiplied on Blackwell GPUs only; all others anywhere."""
    return name != "mx" or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0))


def quantized(config: Any) -> dict[str, Any]:
    from torchao.quantization import quantize_

    model = torch.nn.Sequential(torch.nn.Linear(128, 64)).bfloat16()
    quantize_(model, config)
    return model.state_dict()


@pytest.mark.parametrize(
    "name", sorted(key.partition("/")[2].removesuffix(".bin") for key in MEASURED if "own/" in key)
)
def test_torch_save_of_this_torchao(name: str, tmp_path: Path) -> None:
    config, scheme = configs()[name]
    torch.save(quantized(config), tmp_path / "model.bin")
    found = inspect(str(tmp_path / "model.bin"))
    part = found.components[0]
    assert (found.kind, found.scheme, part.quantized_parameters) == ("torchao", scheme, 128 * 64)
    assert found.loads_here is runs_here(name)
    assert part.loading is not None
    said = {release for release in RELEASES if fits(release, part.loading)}
    since = RELEASES.index(RIGHT_SINCE.get(name, "0.4.0"))
    did = {release for release in RELEASES[since:] if MEASURED[f"own/{name}.bin"][release] != "no"}
    assert said == did
    assert bool(part.loading.imports) == (MEASURED[f"own/{name}.bin"]["0.18.0"] == "import its modules")
    span, here = part.written_by["torchao_range"], version_of("torchao") or ""
    places = [release.removesuffix(".0") for release in RELEASES]
    assert places.index(span["min"]) <= places.index(".".join(here.split(".")[:2])) <= places.index(span["max"])


def test_the_table_holds_every_name_of_this_torchao() -> None:
    """Every class in a file of the installed torchao is in the table, in the newest release."""
    newest = len(RELEASES) - 1
    for name, fate in fates().items():
        assert fate.present is not None, name
        assert fate.present[0] <= fate.present[1] <= newest, name
    assert fates()["torchao.quantization.Int8Tensor"].registered == (RELEASES.index("0.15.0"), newest)


@pytest.mark.parametrize("name", ["int8wo", "int8dq", "fp8wo", "intx4", "mx"])
def test_safetensors_of_torchao(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config, scheme = configs()[name]
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict(quantized(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    found = inspect(str(tmp_path / "model.safetensors")).to_dict()
    assert (found["kind"], found["scheme"]) == ("torchao-safetensors", scheme)
    assert (found["parameters"], found["quantized_parameters"]) == (128 * 64 + 64, 128 * 64)
    least = {"int8wo": "0.16", "int8dq": "0.16", "fp8wo": "0.15", "intx4": "0.15", "mx": "0.17"}[name]
    assert (found["loads_with"]["torchao"]["min"], found["loads_with"]["torchao"]["max"]) == (least, None)
    assert found["loads_here"] is runs_here(name)


def test_a_name_that_no_release_has() -> None:
    span = find_loading(["torchao.quantization.NeverTensor"], [])
    assert not span.possible
    assert fits("0.18.0", span) is False


def test_a_torchao_newer_than_the_table_is_not_judged() -> None:
    span = find_loading(["torchao.quantization.Int8Tensor"], [])
    assert [fits(version, span) for version in ("0.14.1", "0.15.0", "0.18.1", "0.19.0")] == [False, True, True, None]
    old = find_loading(["torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor"], [])
    assert [fits(version, old) for version in ("0.17.3", "0.18.0", "0.19.0")] == [True, False, False]


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "float8wo", "float8wo_e5m2", "intx4wo", "int4dq"])
@pytest.mark.parametrize("family", ["cogvideox", "llama-tied"])
def test_results_of_aoconvert(family: str, scheme: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints(family)
    output = tmp_path / "out"
    result = aoconvert.quantize(source, scheme, output=output, device="cpu", min_quantized=0)
    found = aoconvert.inspect(output).to_dict()
    entry = result.manifest.components[0]
    assert (found["kind"], found["scheme"], found["library"]) == ("torchao", scheme, entry.library)
    main = next(part for part in found["components"] if part["kind"] == "torchao")
    assert main["class"] == entry.class_name
    assert main["quantized_parameters"] == entry.totals.quantized_parameters
    assert main["parameters"] == entry.totals.parameters
    assert found["written_by"]["how"] == "aoconvert.json"
    assert found["written_by"]["torchao"] == version_of("torchao")
    assert found["loads_here"] is True
    assert found["why_not"] is None
    beyond = {name for name in main["globals"] if name.startswith("torchao.")}
    assert beyond == {name for name in entry.safe_globals if name.startswith("torchao.")}
    assert (found["class"] == "CogVideoXPipeline") == (family == "cogvideox")
    # without the manifest the writer is inferred, and what it was is in the range
    (output / "aoconvert.json").unlink()
    span = aoconvert.inspect(output).to_dict()["written_by"]["torchao_range"]
    assert span["max"] == "0.18"


def test_what_is_said_of_the_newest_file_is_what_is_in_it(tmp_path: Path) -> None:
    torch.save(quantized(configs()["int8wo"][0]), tmp_path / "model.bin")
    contents = read_bin(tmp_path / "model.bin")
    found = inspect(str(tmp_path)).to_dict()
    assert found["globals"] == sorted(use.name for use in contents.globals)
    assert found["tensor_classes"] == {"torch.Tensor": 1, "torchao.quantization.Int8Tensor": 1}
    assert found["bytes"] == (tmp_path / "model.bin").stat().st_size
