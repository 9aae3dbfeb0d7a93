import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheme_table import ROWS

from aoconvert import schemes
from aoconvert.errors import UnknownSchemeError, UsageError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "scheme"), [(name, row.scheme) for row in ROWS for name in (row.scheme, *row.names)])
def test_every_name_finds_its_scheme(name: str, scheme: str) -> None:
    assert schemes.find(name).name == scheme
    assert schemes.find(f" {name.upper().replace('_', '-')} ").name == scheme


def test_every_alias_finds_its_own_entry() -> None:
    for entry in schemes.catalogue():
        assert {schemes.find(name).name for name in (entry.name, *entry.aliases)} == {entry.name}


def test_every_entry_has_a_row() -> None:
    assert [entry.name for entry in schemes.catalogue()] == [row.scheme for row in ROWS]
    assert {entry.name: entry.config_class for entry in schemes.catalogue()} == {row.scheme: row.config for row in ROWS}


@pytest.mark.parametrize(
    ("name", "setting", "scheme"),
    [
        ("intx", "int3", "intx3wo"),
        ("intx_weight_only", "torch.int8", "intx8wo"),
        ("IntxWeightOnlyConfig", "INT4", "intx4wo"),
        ("Int8DynamicActivationIntxWeightConfig", "int4", "int4dq"),
        ("Float8WeightOnlyConfig", "float8_e5m2", "float8wo_e5m2"),
    ],
)
def test_a_family_is_chosen_by_its_setting(name: str, setting: str, scheme: str) -> None:
    assert schemes.find(name, {"weight_dtype": setting}).name == scheme
    assert schemes.get(name, settings={"weight_dtype": setting}).name == scheme


@pytest.mark.parametrize("name", ["intx", "intxwo", "intx-weight-only", "IntxWeightOnlyConfig"])
def test_a_bare_family_says_what_to_choose(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        schemes.get(name)
    assert caught.value.hint is not None
    assert all(f"intx{bits}wo" in caught.value.hint for bits in range(1, 9))
    with pytest.raises(UsageError, match="int9"):
        schemes.get(name, settings={"weight_dtype": "int9"})


@pytest.mark.parametrize(
    ("name", "reason", "nearest"),
    [
        ("int4wo", "not in this version", "intx4wo"),
        ("int4_weight_only", "not in this version", "intx4wo"),
        ("Int4WeightOnlyConfig", "not in this version", "intx4wo"),
        ("int4wo-128", "not in this version", "intx4wo"),
        ("float8dq", "not in this version", "float8wo"),
        ("fp8dq", "not in this version", "float8wo"),
        ("fp8dqrow", "not in this version", "float8wo"),
        ("float8dq_e4m3_row", "not in this version", "float8wo"),
        ("float8_dynamic_activation_float8_weight", "not in this version", "float8wo"),
        ("float8_static_activation_float8_weight", "not in this version", "float8wo"),
        ("Float8DynamicActivationFloat8WeightConfig", "not in this version", "float8wo"),
        ("fp6_e3m2", "gone from torchao", "float8wo"),
        ("fpx_weight_only", "gone from torchao", "float8wo"),
        ("uint4wo", "gone from torchao", "intx4wo with --set mapping_type=ASYMMETRIC"),
        ("uint7wo", "gone from torchao", "intx7wo with --set mapping_type=ASYMMETRIC"),
        ("uintx_weight_only", "gone from torchao", "ASYMMETRIC"),
        ("GemliteUIntXWeightOnlyConfig", "gone from torchao", "intx1wo"),
        ("autoquant", "gone from torchao", "int8wo"),
        ("sparsify", "sparse", "int8dq"),
        ("marlin", "sparse", "int8dq"),
        ("int8_dynamic_activation_int8_semi_sparse_weight", "sparse", "int8dq"),
        ("nf4", "not in this version", "int8wo"),
        ("mxfp8", "not in this version", "float8wo"),
        ("mxfp4", "not in this version", "float8wo"),
        ("nvfp4", "not in this version", "float8wo"),
        ("NVFP4WeightOnlyConfig", "not in this version", "float8wo"),
        ("MXDynamicActivationMXWeightConfig", "not in this version", "float8wo"),
    ],
)
def test_known_names_that_are_not_here(name: str, reason: str, nearest: str) -> None:
    with pytest.raises(UnknownSchemeError, match=reason) as caught:
        schemes.get(name)
    assert name in caught.value.message
    assert caught.value.hint is not None
    assert nearest in caught.value.hint


def test_the_way_out_of_uint_works() -> None:
    scheme = schemes.get("intx4wo", settings={"mapping_type": "ASYMMETRIC"})
    assert scheme.config.mapping_type.name == "ASYMMETRIC"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("int8w", "int8wo"),
        ("fp8woo", "float8wo"),
        ("int8_weights_only", "int8wo"),
        ("int8qd", "int8dq"),
        ("intx4ow", "intx4wo"),
    ],
)
def test_a_typo_is_answered_with_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(UnknownSchemeError) as caught:
        schemes.get(typo)
    assert caught.value.exit_code == 2
    assert f"did you mean {meant}" in (caught.value.hint or "")


@given(st.text(max_size=40))
def test_any_name_is_found_or_refused_in_one_line(name: str) -> None:
    try:
        schemes.find(name)
    except UsageError as error:
        assert len(error.message.splitlines()) == 1
        assert error.hint is not None
        assert len(error.hint.splitlines()) == 1


def test_the_catalogue_needs_no_torch() -> None:
    code = """
import sys
from aoconvert import schemes
assert len(schemes.catalogue()) > 10
assert all(schemes.availability(entry) is None for entry in schemes.catalogue())
assert schemes.find("fp8wo").name == "float8wo"
try:
    schemes.get("int9wo")
except Exception as error:
    print(type(error).__name__)
heavy = {"torch", "torchao", "diffusers", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "UnknownSchemeError"), done.stderr


def test_availability_names_what_is_missing() -> None:
    entry = schemes.find("int8wo")
    assert schemes.availability("int8wo") is None
    newer = dataclasses.replace(entry, requires=("torchao>=99.1",))
    assert (schemes.availability(newer) or "").startswith("needs torchao>=99.1, here is 0.")
    absent = dataclasses.replace(entry, requires=("torchao>=0.18", "no-such-package-anywhere>=1"))
    assert schemes.availability(absent) == "needs no-such-package-anywhere>=1, which is not installed"
    with pytest.raises(UnknownSchemeError):
        schemes.availability("no such scheme")
