"""Files as old torchao wrote them: classes that are gone, as stand-ins of the same names, pickled by torch itself.

A stand-in is a wrapper subclass with the attributes that the old class had; real files of every release lie in
``tests/fixtures/legacy``, and ``tests/rewriting/test_migrate.py`` compares the two.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

AFFINE = "torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor"
PLAIN = "torchao.dtypes.uintx.plain_layout.PlainAQTTensorImpl"
FLOAT8 = "torchao.dtypes.floatx.float8_layout.Float8AQTTensorImpl"
DYNAMIC = "torchao.quantization.linear_activation_quantized_tensor.LinearActivationQuantizedTensor"
FPX = "torchao.dtypes.fpx.fpx.FpxTensorCoreAQTLayout"
FPX_LAYOUT = "torchao.dtypes.fpx.fpx.FpxTensorCoreLayoutType"
LAYOUTS = {PLAIN: "torchao.dtypes.utils.PlainLayout", FLOAT8: "torchao.dtypes.floatx.float8_layout.Float8Layout"}


class Wrapper(torch.Tensor):
    """What every stand-in is."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


@contextlib.contextmanager
def old_names(*dotted: str) -> Iterator[Mapping[str, Any]]:
    """Classes of these names, where pickle looks for them: tensors, and layouts, which are plain."""
    made: dict[str, Any] = {}
    before = {name: sys.modules.get(name) for name in {item.rpartition(".")[0] for item in dotted}}
    try:
        for item in dotted:
            module, _, name = item.rpartition(".")
            bases = (Wrapper,) if name.endswith(("Tensor", "Impl", "AQTLayout")) else (object,)
            made[item] = type(name, bases, {"__module__": module, "__qualname__": name})
            if module not in sys.modules or before[module] is sys.modules[module]:
                stand_in = types.ModuleType(module)
                stand_in.__spec__ = importlib.machinery.ModuleSpec(module, None)
                for known, value in vars(before[module] or types.ModuleType("")).items():
                    setattr(stand_in, known, value)
                sys.modules[module] = stand_in
            setattr(sys.modules[module], name, made[item])
        yield made
    finally:
        for module, value in before.items():
            if value is None:
                sys.modules.pop(module, None)
            else:
                sys.modules[module] = value


def wrap(kind: Any, shape: tuple[int, ...], dtype: torch.dtype, **attributes: Any) -> Any:
    """A tensor of a stand-in class."""
    made = torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype)
    made.__dict__.update(attributes)
    return made


def save_fp6(state: Mapping[str, Any], path: Path, name: str, packed: torch.Tensor, scale: torch.Tensor) -> None:
    """Save a state dict with one weight in float6 (e3m2), as torchao 0.5 had it."""
    with old_names(AFFINE, FPX, FPX_LAYOUT) as names:
        layout = names[FPX_LAYOUT]()
        layout.ebits, layout.mbits = 3, 2
        shape, dtype = tuple(state[name].shape), state[name].dtype
        impl = wrap(names[FPX], shape, torch.uint8, packed_fpx_data=packed, scale=scale, layout_type=layout)
        settings = {"block_size": [shape[0], 1], "quant_min": None, "quant_max": None, "zero_point_domain": None}
        made = wrap(names[AFFINE], shape, dtype, layout_tensor=impl, **settings)
        torch.save({**state, name: made}, path)


def save_old(state: Mapping[str, torch.Tensor], path: Path, quantized: frozenset[str], **options: Any) -> None:
    """Save a state dict, these weights in int8 as torchao 0.10 had it: a scale per row, zero points of int64 zeros."""
    with old_names(AFFINE, PLAIN, LAYOUTS[PLAIN]) as names:
        made: dict[str, Any] = {}
        for name, tensor in state.items():
            made[name] = tensor
            if name in quantized:
                scale = (tensor.float().abs().amax(1) / 127).to(tensor.dtype)
                codes = (tensor.float() / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
                made[name] = _int8(names, codes, scale)
        torch.save(made, path, **options)


def save_old_float8(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Save these weights in float8 as torchao 0.10 had it, a scale per row: of a row of zeros it is 0."""
    with old_names(AFFINE, FLOAT8, LAYOUTS[FLOAT8]) as names:
        made: dict[str, Any] = {}
        for name, tensor in state.items():
            shape, layout = tuple(tensor.shape), names[LAYOUTS[FLOAT8]]()
            layout.mm_config = None
            scale = tensor.float().abs().amax(1) / 448
            values = (tensor.float() / scale[:, None]).to(torch.float8_e4m3fn)
            impl = wrap(
                names[FLOAT8], shape, values.dtype, float8_data=values, scale=scale, transposed=False, _layout=layout
            )
            settings = {"block_size": (1, shape[1]), "quant_min": -448, "quant_max": 448, "zero_point_domain": None}
            made[name] = wrap(names[AFFINE], shape, tensor.dtype, tensor_impl=impl, **settings)
        torch.save(made, path)


def save_codes(shapes: Mapping[str, tuple[int, int]], plain: Mapping[str, torch.Tensor], path: Path) -> None:
    """Save random int8 weights of these shapes, as ``save_old`` does, beside plain tensors."""
    with old_names(AFFINE, PLAIN, LAYOUTS[PLAIN]) as names:
        made: dict[str, Any] = dict(plain)
        for name, shape in shapes.items():
            codes = torch.randint(-128, 128, shape, dtype=torch.int8)
            made[name] = _int8(names, codes, torch.full(shape[:1], 0.001, dtype=torch.bfloat16))
        torch.save(made, path)


def _int8(names: Mapping[str, Any], codes: torch.Tensor, scale: torch.Tensor) -> Any:
    from torchao.quantization.quant_primitives import ZeroPointDomain

    shape, settings = tuple(codes.shape), {"quant_min": None, "quant_max": None}
    zero_point, layout = torch.zeros(len(scale), dtype=torch.int64), names[LAYOUTS[PLAIN]]()
    impl = wrap(names[PLAIN], shape, torch.int8, int_data=codes, scale=scale, zero_point=zero_point, _layout=layout)
    return wrap(
        names[AFFINE],
        shape,
        scale.dtype,
        tensor_impl=impl,
        block_size=(1, shape[1]),
        **settings,
        zero_point_domain=ZeroPointDomain.INT,
    )
