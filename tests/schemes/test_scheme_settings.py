from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode
from torchao.quantization import MappingType, PerAxis, PerGroup, PerRow
from torchao.quantization.granularity import PerBlock, PerTensor
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm, IntxChooseQParamsAlgorithm

from aoconvert import schemes
from aoconvert.errors import AoconvertError, UsageError


@pytest.mark.parametrize(
    ("scheme", "key", "text", "value"),
    [
        ("int8wo", "granularity", "per_row", PerRow()),
        ("int8wo", "granularity", "row", PerRow()),
        ("int8wo", "granularity", "PerRow()", PerRow()),
        ("int8wo", "granularity", "per-tensor", PerTensor()),
        ("int8wo", "granularity", "PerTensor()", PerTensor()),
        ("int8wo", "granularity", "per_group:64", PerGroup(64)),
        ("int8wo", "granularity", "group:64", PerGroup(64)),
        ("int8wo", "granularity", "PerGroup(64)", PerGroup(64)),
        ("int8wo", "granularity", "PerGroup(group_size = 64)", PerGroup(64)),
        ("intx4wo", "granularity", "per_axis:0", PerAxis(0)),
        ("intx4wo", "granularity", "PerAxis(axis=0)", PerAxis(0)),
        ("int4dq", "weight_granularity", "group:16", PerGroup(16)),
        ("int8dq", "granularity", "per_tensor, per_row", [PerTensor(), PerRow()]),
        ("int8dq", "granularity", "none", None),
        ("int8dq", "act_mapping_type", "ASYMMETRIC", MappingType.ASYMMETRIC),
        ("int8dq", "act_mapping_type", "MappingType.Asymmetric", MappingType.ASYMMETRIC),
        ("int8dq", "reduce_range", "yes", True),
        ("int8dq", "reduce_range", "None", None),
        ("int8wo", "set_inductor_config", "false", False),
        ("int8wo", "set_inductor_config", "0", False),
        ("int8wo", "version", "2", 2),
        ("intx4wo", "scale_dtype", "torch.float16", torch.float16),
        ("intx4wo", "scale_dtype", "none", None),
        ("intx4wo", "weight_dtype", "int4", torch.int4),
        ("intx4wo", "intx_packing_format", "UNPACKED_TO_INT8", "unpacked_to_int8"),
        ("float8dq", "activation_value_ub", "1e3", 1000.0),
        ("float8dq_row", "granularity", "per_row", [PerRow(), PerRow()]),
        ("float8dq_block", "granularity", "PerBlock:1x128,block:128x128", [PerBlock([1, 128]), PerBlock([128, 128])]),
        ("mxfp6_e2m3", "weight_dtype", "FP6_E2M3", "fp6_e2m3"),
        ("mxfp8", "scaling_mode", "floor", ScaleCalculationMode.FLOOR),
        ("nvfp4", "use_triton_kernel", "true", True),
        ("int4wo", "group_size", "32", 32),
        ("int4wo", "int4_choose_qparams_algorithm", "HQQ", Int4ChooseQParamsAlgorithm.HQQ),
        ("intx4wo", "intx_choose_qparams_algorithm", "hqq_scale_only", IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY),
    ],
)
def test_values(scheme: str, key: str, text: str, value: Any) -> None:
    assert getattr(schemes.get(scheme, settings={key: text}).config, key) == value


@pytest.mark.parametrize(
    ("scheme", "group_size", "given_settings", "message", "hint"),
    [
        ("int8wo", None, {"foo": "1"}, "no field 'foo'", "granularity"),
        ("intx4wo", None, {"group_size": "32"}, "no field 'group_size'", "--group-size"),
        ("int8wo", None, {"group_size": "64"}, "granularity=PerGroup(64)", "--group-size"),
        ("int8wo", None, {"granularity": "per_group"}, "not a value", "per_group:N"),
        ("int8wo", None, {"granularity": "per_row:1"}, "not a value", "per_row"),
        ("int8wo", None, {"granularity": "rows"}, "not a value", "per_row"),
        ("int8wo", None, {"granularity": "per_axis:0"}, "granularity must be", None),
        ("int8wo", None, {"granularity": "per_group:0"}, "out of range", "32, 64"),
        ("int8wo", None, {"set_inductor_config": "maybe"}, "not a value", "true, false"),
        ("int8wo", None, {"version": "one"}, "not a value", "whole number"),
        ("int8wo", None, {"version": "1"}, "version 1 of Int8WeightOnlyConfig has been removed", None),
        ("float8wo", None, {"version": "1"}, "version=1", None),
        ("intx4wo", None, {"version": "3"}, "version=3", None),
        ("int8dq", None, {"granularity": "row,group:4"}, "Only PerTensor and PerRow", None),
        ("int8dq", None, {"granularity": "row,row,row"}, "not a value", "comma"),
        ("int8dq", None, {"act_mapping_type": "none"}, "act_mapping_type", None),
        (
            "int8dq",
            None,
            {"act_mapping_type": "sym"},
            "not a value",
            "SYMMETRIC, SYMMETRIC_NO_CLIPPING_ERR, ASYMMETRIC",
        ),
        ("int8dq", 32, {}, "fixed group size", "omit"),
        ("intx4wo", None, {"scale_dtype": "int99"}, "not a value", "dtype"),
        ("intx4wo", None, {"scale_dtype": "nn"}, "not a value", "dtype"),
        ("intx4wo", None, {"scale_dtype": "float8_e4m3fn"}, "cannot quantize", None),
        ("intx4wo", None, {"granularity": "per_axis:1"}, "axis must be 0", None),
        ("intx4wo", None, {"weight_dtype": "int2"}, "contradicts scheme intx4wo", "intx2wo"),
        ("float8wo", None, {"weight_dtype": "float8_e5m2"}, "contradicts scheme float8wo", "float8wo_e5m2"),
        ("int4dq", None, {"weight_dtype": "int8"}, "contradicts scheme int4dq", "int8dq_int8"),
        ("intx4wo", None, {"intx_packing_format": "opaque_torchao_auto"}, "contradicts", "int4wo"),
        ("int4dq", None, {"intx_packing_format": "opaque_aten_kleidiai"}, "contradicts", "int4wo"),
        ("int4dq", None, {"act_mapping_type": "symmetric"}, "MappingType.ASYMMETRIC", None),
        ("int8wo", 32, {"granularity": "row"}, "set the same", "give one"),
        ("int4wo", None, {"int4_packing_format": "plain"}, "cannot be set", "--layout-device"),
        ("int4wo", None, {"int4_choose_qparams_algorithm": "gptq"}, "not a value", "TINYGEMM, HQQ"),
        ("int4wo", 32, {"group_size": "32"}, "set the same", None),
        ("int4wo", 48, {}, "no group size 48", "32, 64"),
        ("int4wo", 0, {}, "no group size 0", "32, 64"),
        ("float8dq", 32, {}, "fixed group size", "omit"),
        ("float8dq", None, {"granularity": "block:1x128,block:128x128"}, "contradicts", "float8dq_block"),
        ("float8dq_row", None, {"granularity": "per_tensor"}, "contradicts scheme float8dq_row", "use scheme float8dq"),
        ("float8dq", None, {"activation_value_ub": "nan"}, "not a value", "a finite number"),
        ("float8dq", None, {"mm_config": "x"}, "not a value", "nothing on the command line"),
        ("float8dq", None, {"kernel_preference": "cuda"}, "not a value", "AUTO, TORCH"),
        ("mxfp8", None, {"block_size": "16"}, "contradicts", None),
        ("mxfp8", None, {"weight_dtype": "fp6_e2m3"}, "contradicts", "mxfp6_e2m3"),
        ("nvfp4", None, {"step": "prepare"}, "contradicts", "omit it"),
        ("int8wo", 0, {}, "group size 0", "32, 64"),
        ("int8wo", 1, {}, "group size 1", "32, 64"),
        ("int8wo", -32, {}, "group size -32", "32, 64"),
        ("int8wo", 10**12, {}, "group size 1000000000000", "32, 64"),
    ],
)
def test_refusals(
    scheme: str, group_size: int | None, given_settings: dict[str, str], message: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        schemes.get(scheme, group_size=group_size, settings=given_settings)
    assert caught.value.exit_code == 2
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    if hint is not None:
        assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("scheme", "field"),
    [
        ("int8wo", "granularity"),
        ("float8wo", "granularity"),
        ("intx4wo", "granularity"),
        ("int4dq", "weight_granularity"),
    ],
)
def test_group_size_is_per_group(scheme: str, field: str) -> None:
    made = schemes.get(scheme, group_size=64)
    assert getattr(made.config, field) == PerGroup(64)
    assert (made.group_size, made.format.granularity) == (64, "per group of 64")
    assert made == schemes.get(scheme, settings={field: "per_group:64"})


_KEYS = ["granularity", "weight_dtype", "version", "scale_dtype", "reduce_range", "mapping_type", "intx_packing_format"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["int8wo", "int8dq", "float8wo", "intx4wo", "int4dq", "float8dq", "mxfp8", "nvfp4", "int4wo"]),
    st.dictionaries(
        st.one_of(st.sampled_from(_KEYS), st.text(max_size=8)),
        st.one_of(
            st.sampled_from(["per_row", "none", "true", "2", "asymmetric", "int4", "group:8"]), st.text(max_size=12)
        ),
        max_size=2,
    ),
)
def test_any_setting_is_taken_or_refused_in_one_line(scheme: str, given_settings: dict[str, str]) -> None:
    try:
        made = schemes.get(scheme, settings=given_settings)
    except AoconvertError as error:
        assert isinstance(error, UsageError)
        assert len(error.message.splitlines()) == 1
    else:
        assert made.name == scheme


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"activation_dtype": "int4"}, "cannot multiply by int4"),
        ({"activation_dtype": "float16"}, "cannot multiply by float16"),
        ({"activation_value_ub": "-1"}, "between None and -1.0"),
        ({"activation_value_ub": "0"}, "between None and 0.0"),
        ({"activation_value_lb": "-1"}, "between -1.0 and None"),
        ({"activation_value_lb": "3", "activation_value_ub": "2"}, "between 3.0 and 2.0"),
    ],
)
def test_activations_that_torchao_takes_and_cannot_use(given_settings: dict[str, str], message: str) -> None:
    for name in ("float8dq", "float8dq_row"):
        with pytest.raises(UsageError, match=message):
            schemes.get(name, settings=given_settings)
    assert schemes.get("float8dq", settings={"activation_dtype": "float8_e5m2"}).format.activation


def test_a_contradiction_names_the_scheme_that_differs_in_nothing_else() -> None:
    for name, other in (("uint4wo", "uint3wo"), ("intx4wo", "intx3wo"), ("int4dq", "int8dq_int3")):
        with pytest.raises(UsageError, match="contradicts") as caught:
            schemes.get(name, settings={"weight_dtype": "int3"})
        assert caught.value.hint == f"use scheme {other}"
