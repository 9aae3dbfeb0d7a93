"""Every scheme of the catalogue is recognised in a file by its names alone, and what it needs to run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aoconvert import schemes
from aoconvert.environment import import_torchao
from aoconvert.inspection.inspect import inspect
from aoconvert.schemes.apply import quantize_weight

NAMES = [entry.name for entry in schemes.catalogue()]
PACKED = {"cuda": [8, 0], "xpu": None}


def write(folder: Path, name: str, device: str | None = None, **changes: Any) -> schemes.Scheme:
    """A model of one weight as ``torch.save`` writes it, and the config that names the scheme's torchao config."""
    scheme = schemes.get(name, layout_device=device)
    torch.manual_seed(0)
    weight: Any = quantize_weight(torch.randn(128, 256, dtype=torch.bfloat16), scheme)
    for attribute, value in changes.items():
        setattr(weight, attribute, value)
    torch.save({"layer.weight": weight}, folder / "model.bin")
    quantization = {"quant_method": "torchao", "quant_type": {"default": scheme.config_dict}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return scheme


@pytest.mark.parametrize("name", NAMES)
def test_every_scheme_has_its_name(name: str, tmp_path: Path) -> None:
    scheme = write(tmp_path, name)
    found = inspect(str(tmp_path / "model.bin"))
    [part] = found.components
    assert (found.kind, found.scheme, part.quantized_parameters) == ("torchao", name, 128 * 256)
    assert (part.layout_device, part.min_capability) == (scheme.layout.device, scheme.layout.min_capability)
    assert part.loading is not None and part.loading.possible
    registered = set(part.loading.imports)
    assert bool(registered) == any(".prototype." in name for name in found.to_dict()["globals"])


@pytest.mark.parametrize("device", PACKED)
def test_int4_for_a_device_that_packs_it(device: str, tmp_path: Path) -> None:
    write(tmp_path, "int4wo", device)
    found = inspect(str(tmp_path)).to_dict()
    assert (found["scheme"], found["layout_device"]) == ("int4wo", device)
    assert found["components"][0]["min_capability"] == PACKED[device]
    if not getattr(torch, device).is_available():
        assert found["loads_here"] is False
        assert f"packed for {device}" in found["why_not"]


def test_the_cpu_s_int4_does_not_say_which_cpu(tmp_path: Path) -> None:
    write(tmp_path, "int4wo", "cpu")
    found = inspect(str(tmp_path)).to_dict()
    assert (found["layout_device"], found["loads_here"]) == ("cpu", None)
    assert any("depends on the machine" in line for line in found["advice"])


def test_products_that_are_emulated_need_no_gpu(tmp_path: Path) -> None:
    from torchao.quantization.quantize_.common import KernelPreference

    write(tmp_path, "mxfp8", kernel_preference=KernelPreference.EMULATED)
    found = inspect(str(tmp_path)).to_dict()
    assert (found["scheme"], found["layout_device"], found["loads_here"]) == ("mxfp8", "any", True)


def fqn_config(*mappings: str) -> dict[str, Any]:
    """A ``quantization_config`` with one rule for each mapping type."""
    configs = {}
    for place, mapping in enumerate(mappings):
        config = dict(schemes.get("intx4wo" if mapping == "SYMMETRIC" else "uint4wo").config_dict)
        configs[f"re:(a+)+{place}"] = config  # looked into, never run as a regular expression
    return {
        "quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": {**configs, "lm_head": None}}}}
    }


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({}, "intx4wo"),
        (lambda: fqn_config("ASYMMETRIC"), "uint4wo"),
        (lambda: fqn_config("SYMMETRIC"), "intx4wo"),
        (lambda: fqn_config("ASYMMETRIC", "ASYMMETRIC"), "uint4wo"),
        (lambda: fqn_config("ASYMMETRIC", "SYMMETRIC"), "intx4wo"),
        ({"quant_type": "int4_weight_only"}, "intx4wo"),
        ({"quant_type": {"default": ["IntxWeightOnlyConfig"]}}, "intx4wo"),
        ({"quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": 4}}}}, "intx4wo"),
        ({"quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": [1]}}}}, "intx4wo"),
    ],
)
def test_a_zero_point_is_in_the_config_only(quantization: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path, "uint4wo")
    values = quantization() if callable(quantization) else quantization
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao", **values}}))
    assert inspect(str(tmp_path)).scheme == name


def test_several_schemes_the_most_parameters_first(tmp_path: Path) -> None:
    made = {
        "a": quantize_weight(torch.randn(64, 64).bfloat16(), schemes.get("float8dq_row")),
        "b": quantize_weight(torch.randn(256, 64).bfloat16(), schemes.get("int8wo")),
        "c": quantize_weight(torch.randn(4, 32, 64).bfloat16(), schemes.get("float8wo")),
    }
    torch.save(made, tmp_path / "model.bin")
    found = inspect(str(tmp_path / "model.bin"))
    assert found.scheme == "int8wo+float8wo+float8dq_row"
    assert (found.components[0].layout_device, found.components[0].min_capability) == ("any", (8, 9))
    assert any("on CUDA it runs only on capability 8.9" in line for line in found.components[0].advice)


def test_int4_of_mslk(tmp_path: Path) -> None:
    """torchao's own class, made by hand: what packs it runs on a Hopper GPU only."""
    import_torchao()
    from torchao.quantization import Int4Tensor

    shape, one = torch.Size((64, 128)), torch.ones(1, 64)
    weight = Int4Tensor(
        torch.zeros(64, 64, dtype=torch.int8), one, one, [1, 128], shape, activation_dtype=torch.bfloat16
    )
    torch.save({"layer.weight": weight}, tmp_path / "model.bin")
    found = inspect(str(tmp_path / "model.bin")).to_dict()
    assert (found["scheme"], found["layout_device"], found["quantized_parameters"]) == ("int4wo", "cuda", 64 * 128)
    assert any("mslk" in line for line in found["advice"])


def test_no_torch_is_needed(tmp_path: Path) -> None:
    write(tmp_path, "float8dq_row")
    script = (
        "import sys\nfrom aoconvert.inspection.inspect import inspect\n"
        "print(inspect(sys.argv[1]).scheme, 'torch' in sys.modules, 'torchao' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.bin")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["float8dq_row", "False", "False"]
