"""Weights of old torchao that are packed for one kernel: int4 for CUDA and for CPUs, floats of 3 to 7 bits, NF4."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.rewriting.migrate_types import CannotMigrate, Outcome, Read, SchemeName, dtype_of
from aoconvert.rewriting.old_torchao.activations import Activations
from aoconvert.rewriting.old_torchao.weight import AGAIN, Weight, as_values
from aoconvert.schemes import floatx_packing, tile_packing
from aoconvert.schemes.int4_parts import COLUMNS, INNER_K_TILES
from aoconvert.schemes.tensor_classes.current import ONE_MACHINE

PACKED_ON = {"avx512": "avx512", "avx2": "avx2", "generic": "pairs32"}
"""What ``--packed-on`` names → the layout of :mod:`aoconvert.schemes.cpu_packing`."""

UNPROVEN = "its tiles were not yet compared with the bytes that old torchao wrote on a GPU"
_GROUPS = (32, 64, 128, 256)


def tiled(weight: Weight, activations: Activations) -> Outcome:
    """Tiles for tinygemm's CUDA kernel. Up to torchao 0.7 the CPU's layout had this name, too."""
    packed = weight.part("packed_weight")
    if packed.dtype == "uint8" and len(packed.shape) == 2:
        return int4_cpu(weight, activations)
    _refuse_activations(activations)
    group, both = _group(weight), weight.part("scale_and_zero")
    tiles = weight.layout.get("inner_k_tiles", INNER_K_TILES)
    if type(tiles) is not int or tiles not in tile_packing.INNER_K_TILES or packed.dtype != "int32":
        raise CannotMigrate("its tiles are not as torchao packed them: inner_k_tiles is 2, 4 or 8, and they are int32")
    rows, columns = weight.shape
    wide = columns + -columns % COLUMNS
    down = rows + -rows % tile_packing.ROWS
    if packed.shape != (down // tile_packing.ROWS, wide // (tile_packing.COLUMNS * tiles), 32, tiles // 2):
        raise CannotMigrate(f"its tiles have the shape {packed.shape}")
    if both.shape != (wide // group, down, 2):
        raise CannotMigrate(f"its scales have the shape {both.shape}")
    if tiles == INNER_K_TILES and both.dtype == "bfloat16":

        def make(read: Read) -> torch.Tensor:
            from torchao.quantization import Int4TilePackedTo4dTensor

            made: torch.Tensor = Int4TilePackedTo4dTensor(
                qdata=read(packed),
                scale_and_zero=read(both),
                block_size=[1, group],
                shape=torch.Size(weight.shape),
            )
            return made

        name = SchemeName("int4wo", group, layout_device="cuda")
        return Outcome(make, name, f"its tiles and scales are the same bytes; {UNPROVEN}", unconfirmed=UNPROVEN)

    def codes(read: Read) -> torch.Tensor:
        found = read(packed)
        if found.is_meta:
            return torch.empty(weight.shape, dtype=torch.uint8, device="meta")
        return tile_packing.unpack(found, tiles)[:rows, :columns].contiguous()

    why = f"today's tiles need inner_k_tiles {INNER_K_TILES} and bfloat16, not {tiles} and {both.dtype}; {UNPROVEN}"
    return as_values(_tinygemm(weight, group, codes, both), why)


def int4_cpu(weight: Weight, activations: Activations) -> Outcome:
    """4-bit codes as PyTorch's CPU kernel packed them, in a way that depends on the CPU."""
    _refuse_activations(activations)
    return _opaque(
        weight.outer, weight.part("packed_weight"), weight.part("scale_and_zero"), _group(weight), weight.packed_on
    )


def int4_opaque(tensor: BinTensor, packed_on: str | None) -> Outcome:
    """``Int4OpaqueTensor`` of torchao 0.14 to 0.17: the same, in a module that moved."""
    block = tensor.attributes.get("block_size")
    data, both = tensor.inner.get("qdata"), tensor.inner.get("scale_and_zero")
    group = block[-1] if isinstance(block, tuple) and block and type(block[-1]) is int else 0
    if data is None or both is None or "act_pre_scale" in tensor.inner:
        raise CannotMigrate("its parts are not those of an Int4OpaqueTensor of weights alone")
    return _opaque(tensor, data, both, group, packed_on)


def _opaque(tensor: BinTensor, data: BinTensor, both: BinTensor, group: int, packed_on: str | None) -> Outcome:
    """``Int4OpaqueTensor`` of today, with the same bytes."""
    if packed_on is None:
        raise CannotMigrate(
            f"int4 packed for a CPU: {ONE_MACHINE}",
            "say it with --packed-on avx512, avx2 or generic; most servers have avx512 or avx2",
        )
    rows, columns = tensor.shape
    if data.dtype != "uint8" or data.shape != (rows, columns // 2) or rows % 16 or group not in _GROUPS:
        raise CannotMigrate(f"its packed codes are {data.dtype} of shape {data.shape}, in groups of {group}")
    if both.shape != (columns // group, rows, 2) or columns % group:
        raise CannotMigrate(f"its scales have the shape {both.shape}")

    def make(read: Read) -> torch.Tensor:
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor

        made: torch.Tensor = Int4OpaqueTensor(
            qdata=read(data),
            scale_and_zero=read(both),
            block_size=[1, group],
            shape=torch.Size(tensor.shape),
        )
        return made

    return Outcome(
        make,
        SchemeName("int4wo", group, layout_device="cpu"),
        f"its bytes are the same; that {packed_on} packed them is what --packed-on says",
        packing=f"opaque_{PACKED_ON[packed_on]}",
    )


def _refuse_activations(activations: Activations) -> None:
    if activations.kind != "none":
        raise CannotMigrate(f"packed int4 weights and activations by {activations.function}", AGAIN)


def _group(weight: Weight) -> int:
    rows, group = weight.block
    if rows != 1 or group not in _GROUPS:
        raise CannotMigrate(f"its scales are for blocks of {rows} x {group}")
    return group


def _tinygemm(
    weight: Weight, group: int, codes: Callable[[Read], torch.Tensor], both: BinTensor
) -> Callable[[Read], torch.Tensor]:
    """Makes the values of 4-bit codes: ``(code - 8) * scale + zero``, in the weight's dtype."""
    rows, columns = weight.shape

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

        pairs = read(both)[: columns // group, :rows]
        found: torch.Tensor = _dequantize_affine_tinygemm(
            codes(read),
            (1, group),
            pairs[..., 0].t().contiguous(),
            pairs[..., 1].t().contiguous(),
            torch.uint8,
            0,
            15,
            output_dtype=weight.dtype,
        )
        return found

    return make


def floatx(weight: Weight, activations: Activations) -> Outcome:
    """Floats of 3 to 7 bits for FP6-LLM's kernel, a scale per row."""
    _refuse_activations(activations)
    packed = weight.impl.inner.get("packed_floatx_data") or weight.part("packed_fpx_data")
    scale, rows = weight.part("scale"), weight.shape[0]
    exponent, mantissa = weight.layout.get("ebits"), weight.layout.get("mbits")
    if type(exponent) is not int or type(mantissa) is not int or not 2 <= exponent + mantissa <= 6 or exponent < 1:
        raise CannotMigrate("its layout does not say how many bits exponent and mantissa have")
    bits = 1 + exponent + mantissa
    if packed.shape != (rows, weight.shape[1] * bits // 8) or scale.shape != (rows,) or packed.dtype != "uint8":
        raise CannotMigrate(f"its packed values have the shape {packed.shape}, its scales {scale.shape}")

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization.quant_primitives import _dequantize_affine_floatx

        data = read(packed)
        if data.is_meta:
            return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        values = floatx_packing.unpack(data, bits)
        found: torch.Tensor = _dequantize_affine_floatx(values, read(scale), exponent, mantissa, weight.dtype)
        return found

    return as_values(make, f"torchao has no class for floats of {bits} bits any more")


def nf4(tensor: BinTensor) -> Outcome:
    """``NF4Tensor``, which moved. torchao still has the class, but no config that makes it."""
    parts = {name: tensor.inner.get(name) for name in _NF4}
    sizes = [tensor.attributes.get(name) for name in ("block_size", "n_blocks", "scaler_block_size")]
    if None in parts.values() or not all(type(size) is int and size > 0 for size in sizes):
        raise CannotMigrate("its parts are not those of an NF4Tensor")
    block, blocks, scalers = (int(size) for size in sizes if isinstance(size, int))
    numel = torch.Size(tensor.shape).numel()
    wanted = {
        "quantized_scalers": ("int8", (blocks,)),
        "quantization_factor": (tensor.dtype, (blocks // scalers,)),
        "scaler_mean": (tensor.dtype, ()),
        "quantized_data": ("uint8", (numel // 2,)),
        "nf4": (tensor.dtype, (16,)),
    }
    found = {name: (part.dtype, part.shape) for name, part in parts.items() if part is not None}
    if found != wanted or block * blocks != numel or blocks % scalers:
        raise CannotMigrate("its parts do not fit its shape and its blocks")

    def make(read: Read) -> torch.Tensor:
        from torchao.quantization import NF4Tensor
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

        held = {name: read(part) for name, part in parts.items() if part is not None}
        if held["nf4"].is_meta:
            return torch.empty(tensor.shape, dtype=dtype_of(tensor), device="meta")
        like = torch.empty(tensor.shape, device="meta")
        facts = SubclassTensorArgs(
            like.shape, like.stride(), 0, dtype_of(tensor), held["nf4"].device, requires_grad=False
        )
        made: torch.Tensor = NF4Tensor(facts, *sizes, **held).get_original_weight()
        return made

    return as_values(make, "torchao has no config for NF4, which a config.json would have to name")


_NF4 = ("quantized_scalers", "quantization_factor", "scaler_mean", "quantized_data", "nf4")
