"""The lists of names and sizes against torch and torchao themselves."""

import subprocess
import sys

import pytest
import torch
from torch._weights_only_unpickler import IMPORT_MAPPING, NAME_MAPPING, _get_allowed_globals
from torch.storage import _storage_type_to_dtype_map

from aoconvert.formats.torch_bin.rebuild import _SETTERS
from aoconvert.formats.torch_bin.safe_names import ITEMSIZE, STORAGE_DTYPE, Kind, list_names, lookup


def test_itemsizes_and_storages_are_torch_s():
    for name, size in ITEMSIZE.items():
        assert getattr(torch, name).itemsize == size
    for name, dtype in STORAGE_DTYPE.items():
        if name.startswith("torch.storage."):
            continue
        assert _storage_type_to_dtype_map()[name.removeprefix("torch.")] == getattr(torch, dtype)


def test_torch_s_names_are_among_what_weights_only_allows():
    allowed = set(_get_allowed_globals())
    names = {name for name, known in list_names().items() if not name.startswith("torchao.") and not known.legacy}
    assert names - allowed <= {"__builtin__.set"} | {
        f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)
    }


def test_no_name_is_one_that_unpicklers_rename():
    for name in list_names():
        module, _, attribute = name.rpartition(".")
        assert (module, attribute) not in NAME_MAPPING
        assert module not in IMPORT_MAPPING or name == "__builtin__.set"


def test_torchao_s_names_are_what_it_registers():
    script = """
import importlib, pkgutil, sys, torch, torchao
from pathlib import Path
root = Path(torchao.__file__).parent
for path in root.rglob("*.py"):
    if "add_safe_globals" in path.read_text():
        parts = path.relative_to(root.parent).with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
names = {f"{c.__module__}.{c.__qualname__}" for c in torch.serialization.get_safe_globals()}
print(*sorted(name for name in names if name.startswith("torchao.")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    registered = set(done.stdout.split())
    ours = {name for name, known in list_names().items() if name.startswith("torchao.") and not known.legacy}
    assert registered == ours


@pytest.mark.filterwarnings("ignore:volatile")
def test_setters_are_torch_s():
    for name in dir(torch.Tensor):
        for value in (torch.zeros(3), True, None, {}):
            tensor = torch.ones(3)
            try:
                setattr(tensor, name, value)
            except Exception:
                continue
            assert name.startswith("__") or name in vars(tensor) or name in _SETTERS


def test_legacy_is_never_today_s():
    assert lookup("torchao.quantization", "Int8Tensor").legacy is False
    assert lookup("torchao.dtypes.affine_quantized_tensor", "AffineQuantizedTensor").legacy is True
    assert lookup("functools", "partial").kind is Kind.PARTIAL
    for hostile in (
        ("os", "system"),
        ("builtins", "getattr"),
        ("torch", "serialization._get_layout"),
        ("torch", "load"),
    ):
        assert lookup(*hostile) is None
