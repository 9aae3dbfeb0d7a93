"""Well-known names that are no scheme here: why, and what to take instead.

Since which torchao something is gone was read in the released wheels 0.13.0 to 0.18.0. First match wins.
"""

from __future__ import annotations

from aoconvert.schemes.table.entry import Missing

_CALIBRATION = "not supported: it needs activation ranges from calibration data, and aoconvert runs no calibration"
_SPARSE = "2:4 sparsity, which needs pruned weights; torchao"
_MSLK = "packed by kernels of the package mslk, only on a Hopper GPU"
_GEMLITE_NEAREST = "int4wo --layout-device cuda (packed int4 for torch's own kernel; no gemlite needed), or int8wo"

MISSING = (
    Missing(
        r"(float8|fp8|int8)_?static.*|nvfp4_?static.*",
        _CALIBRATION,
        "float8dq or int8dq (the range of every activation is measured during inference)",
    ),
    Missing(r"(float8|fp8)(_?dq|wo_?dq).*e5m2.*", "impossible: no GPU multiplies e5m2 by e5m2", "float8dq (e4m3)"),
    Missing(
        r"(float8|fp8).*(int4_?w.*)",
        _MSLK,
        "int4wo --layout-device cuda (the same 4-bit weights, activations untouched)",
    ),
    Missing(
        r"(fp[1-7]|float[1-7])_e\d+m\d+(wo)?|fpx.*|(fp|float)[567](wo|_weight_only|_llm)?",
        "removed in torchao 0.16, with its kernels for 1 to 7-bit floats",
        "float8wo (8 bits instead of fewer), nvfp4wo (4-bit floats), or mxfp6_e3m2 (6-bit floats, one per byte)",
    ),
    Missing(
        r"gemlite.*",
        "the form that checkpoints used was removed in torchao 0.17",
        _GEMLITE_NEAREST,
    ),
    Missing(
        r"(int8_?dynamic_?activation_?)?uintx_?weight(_?only)?_?config|uintxbitpacked.*",
        "packed by gemlite's Triton kernels, only on a CUDA device; its AQT form was removed in torchao 0.17",
        _GEMLITE_NEAREST + "; uint1wo to uint8wo have the same values, one per byte",
    ),
    Missing(
        r"auto_?quant.*",
        "removed in torchao 0.17: it timed kernels on the GPU and wrote no checkpoint",
        "auto (chooses a scheme for each tensor by error and size), int8wo, or int8dq where speed counts",
    ),
    Missing(
        r".*marlin.*",
        f"{_SPARSE} 0.16 dropped its Marlin layouts",
        "int4wo --layout-device cuda (dense 4-bit weights, a little larger, no pruning)",
    ),
    Missing(
        r"int8.*semi_?sparse.*|.*int8.*sparse.*",
        f"{_SPARSE} 0.17 dropped its int8 layout",
        "int8dq (the same 8-bit weights and activations, dense)",
    ),
    Missing(
        r"(float8|fp8).*sparse.*|cutlass.*sparse.*",
        f"{_SPARSE} packs it for CUTLASS, only on a Hopper GPU",
        "float8dq_row (the same 8-bit weights and activations, dense)",
    ),
    Missing(
        r".*block_?sparse.*",
        "block sparsity, which needs pruned weights and a Triton kernel",
        "int4wo (smaller) or int8dq (faster), both dense",
    ),
    Missing(
        r"sparsify.*|.*semi_?sparse.*|.*2_?4_?sparse.*",
        f"{_SPARSE} 0.17 removed its integer weights",
        "int4wo (smaller) or int8dq (faster), both dense",
    ),
    Missing(
        r"nf4.*|.*_nf4|bnb_?4bit|normal_?float_?4.*",
        "impossible: torchao's config_from_dict does not know its own NF4WeightOnlyConfig, so from_pretrained fails, "
        "and transformers cannot load an NF4Tensor (aten.alias)",
        "nvfp4wo (4-bit floats, any device) or int4wo (4-bit integers)",
    ),
    Missing(r"quanto.*", "not a Quanto type", "quanto-float8, quanto-int8, quanto-int4 or quanto-int2"),
    Missing(
        r"awq.*|gptq.*|smooth_?quant.*|auto_?round.*|spin_?quant.*",
        _CALIBRATION,
        "int4wo (with --set int4_choose_qparams_algorithm=hqq, which needs no data either)",
    ),
    Missing(
        r"(module_?)?fqn_?to_?config|ao_?per_?module_?config|mixed",
        "not one scheme: it names a scheme for each tensor",
        "auto, or --recipe FILE (a config.json with an FqnToConfig is such a file)",
    ),
    Missing(
        r"hqq.*",
        "a way to choose the scales of int4wo, not a scheme",
        "int4wo --layout-device cuda --set int4_choose_qparams_algorithm=hqq",
    ),
    Missing(
        r"mxfp6|mx_fp6",
        "two schemes",
        "mxfp6_e2m3 (more precision) or mxfp6_e3m2 (more range)",
    ),
    Missing(r"mx_?int8|mxint.*", "not in torchao: its MXTensor supports only floats", "int8wo --group-size 32"),
)
