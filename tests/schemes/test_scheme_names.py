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


def test_every_entry_says_when_to_choose_it_and_who_says_so() -> None:
    for entry in schemes.catalogue():
        assert entry.summary
        assert entry.source
        assert "\n" not in entry.summary + entry.source


# every name that diffusers documented for TorchAoConfig up to 0.33, and those of diffusers-torchao's tables
DOCUMENTED = (
    *("int4wo", "int4_weight_only", "int4dq", "int8_dynamic_activation_int4_weight"),
    *("int8wo", "int8_weight_only", "int8dq", "int8_dynamic_activation_int8_weight"),
    *("float8wo", "float8_weight_only", "float8wo_e5m2", "float8wo_e4m3", "float8dq", "float8dq_e4m3"),
    *("float8dq_e4m3_tensor", "float8dq_e4m3_row", "float8_dynamic_activation_float8_weight"),
    *(f"uint{bits}wo" for bits in range(1, 8)),
    *("fp8wo", "fp8dq", "fp8dqrow"),
)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_work(name: str) -> None:
    assert schemes.get(name).name == schemes.find(name).name


def test_auto_is_no_single_scheme() -> None:
    for name in ("auto", " AUTO "):
        with pytest.raises(UsageError, match="not a single scheme") as caught:
            schemes.find(name)
        assert caught.value.exit_code == 2
        assert not isinstance(caught.value, UnknownSchemeError)


@pytest.mark.parametrize(
    ("name", "scheme", "group_size"),
    [
        ("int4wo-32", "int4wo", 32),
        ("INT4WO_64", "int4wo", 64),
        ("int4-weight-only-128", "int4wo", 128),
        ("quanto-int4", "int4wo", 128),
        ("quanto-int2", "uint2wo", 128),
    ],
)
def test_a_name_may_bring_a_group_size(name: str, scheme: str, group_size: int) -> None:
    made = schemes.get(name)
    assert (made.name, made.group_size) == (scheme, group_size)
    assert schemes.get(name, group_size=64).group_size == 64


@pytest.mark.parametrize(
    ("name", "setting", "scheme"),
    [
        ("intx", "int3", "intx3wo"),
        ("intx_weight_only", "torch.int8", "intx8wo"),
        ("IntxWeightOnlyConfig", "INT4", "intx4wo"),
        ("Int8DynamicActivationIntxWeightConfig", "int4", "int4dq"),
        ("Int8DynamicActivationIntxWeightConfig", "int3", "int8dq_int3"),
        ("uintx_weight_only", "int4", "uint4wo"),
        ("Float8WeightOnlyConfig", "float8_e5m2", "float8wo_e5m2"),
        ("MXDynamicActivationMXWeightConfig", "float4_e2m1fn_x2", "mxfp4"),
        ("MXDynamicActivationMXWeightConfig", "fp6_e3m2", "mxfp6_e3m2"),
    ],
)
def test_a_family_is_chosen_by_its_setting(name: str, setting: str, scheme: str) -> None:
    assert schemes.find(name, {"weight_dtype": setting}).name == scheme
    assert schemes.get(name, settings={"weight_dtype": setting}).name == scheme


def test_float8_dynamic_is_chosen_by_its_granularity() -> None:
    config = "Float8DynamicActivationFloat8WeightConfig"
    assert schemes.get(config).name == "float8dq"
    assert schemes.get(config, settings={"granularity": "per-row"}).name == "float8dq_row"
    assert schemes.get(config, settings={"granularity": "tensor"}).name == "float8dq"


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
        ("float8_static_activation_float8_weight", "calibration", "float8dq"),
        ("Float8StaticActivationFloat8WeightConfig", "calibration", "float8dq"),
        ("Int8StaticActivationInt8WeightConfig", "calibration", "int8dq"),
        ("awq", "calibration", "int4wo"),
        ("float8dq_e5m2", "e5m2 by e5m2", "float8dq"),
        ("Float8DynamicActivationInt4WeightConfig", "mslk", "int4wo"),
        ("fp6_e3m2", "removed in torchao 0.16", "mxfp6_e3m2"),
        ("fp4_e2m1", "removed in torchao 0.16", "nvfp4wo"),
        ("fpx_weight_only", "removed in torchao 0.16", "float8wo"),
        ("FPXWeightOnlyConfig", "removed in torchao 0.16", "float8wo"),
        ("UIntXWeightOnlyConfig", "removed in torchao 0.17", "uint1wo to uint8wo"),
        ("GemliteUIntXWeightOnlyConfig", "removed in torchao 0.17", "int4wo"),
        ("autoquant", "removed in torchao 0.17", "int8wo"),
        ("sparsify", "2:4", "int8dq"),
        ("marlin_sparse", "0.16 dropped", "int4wo"),
        ("int8_dynamic_activation_int8_semi_sparse_weight", "0.17 dropped", "int8dq"),
        ("Float8DynamicActivationFloat8SemiSparseWeightConfig", "Hopper", "float8dq_row"),
        ("nf4", "config_from_dict", "nvfp4wo"),
        ("NF4WeightOnlyConfig", "aten.alias", "int4wo"),
        ("quanto", "Quanto", "quanto-int8"),
        ("hqq", "int4wo", "int4_choose_qparams_algorithm=hqq"),
        ("mxfp6", "two schemes", "mxfp6_e2m3"),
        ("mxint8", "not in torchao", "int8wo"),
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


def test_configs_of_many_schemes_and_block_sparsity_are_what_they_are() -> None:
    for name in ("FqnToConfig", "ModuleFqnToConfig", "AOPerModuleConfig"):
        with pytest.raises(UnknownSchemeError, match="not one scheme") as caught:
            schemes.find(name)
        assert "--recipe" in (caught.value.hint or "")
    with pytest.raises(UnknownSchemeError, match="is block sparsity"):
        schemes.find("BlockSparseWeightConfig")
