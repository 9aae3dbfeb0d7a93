"""torchao's own code for packed int4 on a machine without its device.

Only what asks for the device is taken away: the question for the GPU's capability, the assertions on the weight's
device, and the op that packs, which is done one thread after the other (``warps``). All else runs as torchao wrote it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int4PlainInt32Tensor, Int4TilePackedTo4dTensor
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm
from torchao.quantization.quantize_.workflows.int4 import int4_plain_int32_tensor

from helpers.warps import pack_by_threads


class Packing(TorchDispatchMode):
    """The packing op of a device, done in Python."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._convert_weight_to_int4pack.default:
            return func(*args, **(kwargs or {}))
        weight, inner_k_tiles = args
        if self.device == "cuda":
            return torch.tensor(pack_by_threads(weight.tolist(), inner_k_tiles), dtype=torch.int32)
        return torch.tensor([_words(row) for row in weight.tolist()], dtype=torch.int32)


def _words(row: list[int]) -> list[int]:
    """Four bytes after the other in a word (``WeightInt4PackKernel.cpp`` of intel/torch-xpu-ops)."""
    words = [sum(byte << (8 * place) for place, byte in enumerate(row[at : at + 4])) for at in range(0, len(row), 4)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@contextmanager
def _capability() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        yield


def for_cuda(weight: torch.Tensor, group_size: int, algorithm: str = "tinygemm") -> Any:
    """``Int4TilePackedTo4dTensor.from_hp``."""
    block = [1] * (weight.dim() - 1) + [group_size]
    with _capability(), Packing("cuda"):
        return Int4TilePackedTo4dTensor.from_hp(weight, block, Int4ChooseQParamsAlgorithm(algorithm))


def for_xpu(weight: torch.Tensor, group_size: int) -> Any:
    """``_from_hp_xpu``, without its assertion on the weight's device."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(int4_plain_int32_tensor._from_hp_xpu)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    (device,) = [node for node in body if isinstance(node, ast.Assert) and "device" in ast.unparse(node.test)]
    body.remove(device)
    names = dict(vars(int4_plain_int32_tensor))
    exec(compile(tree, "_from_hp_xpu", "exec"), names)
    with Packing("xpu"):
        return names["_from_hp_xpu"](Int4PlainInt32Tensor, weight, [1, group_size])
