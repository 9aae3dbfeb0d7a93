"""What torchao itself makes of a model: the right side of every comparison in the table.

torchao's own ``quantize_`` goes over the model that the library has loaded. Some of its handlers first ask for a GPU
and then do plain arithmetic; their question is answered with yes, and all else is torchao's. The int4 layouts of other
devices are made by torchao's classes, one weight after the other (``tests/schemes/torchao_int4.py``).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Collection
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from helpers import torchao_int4
from helpers.warps import WARP, pack_by_threads
from torchao.prototype.mx_formats import inference_workflow
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import FqnToConfig, quant_api, quantize_

from aoconvert.schemes import Scheme

OWN = "quantize_"
ANSWERED = "quantize_, its question for a GPU answered with yes"
BY_CLASS = "torchao's class for the device, without its packing op"

_ASK = ("Float8DynamicActivationFloat8WeightConfig", "NVFP4DynamicActivationNVFP4WeightConfig")


def expected(model: torch.nn.Module, scheme: Scheme, names: Collection[str]) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict of the model with these parameters quantized, and who quantized them.

    Args:
        model: as its library loaded it; it stays as it is.
        scheme: what to quantize to.
        names: of the parameters.
    """
    int4 = scheme.entry.layout_device is not None
    if int4 and scheme.layout.device != "cpu":
        return _by_class(model, scheme, names), BY_CLASS
    model = deepcopy(model)
    config: Any = scheme.config
    if int4:
        config = PrototypeInt4WeightOnlyConfig(config.group_size, config.int4_choose_qparams_algorithm, False)
    if hasattr(config, "set_inductor_config"):
        config = dataclasses.replace(config, set_inductor_config=False)  # it is about the process, not the weights
    asks = type(config).__name__ in _ASK
    with pytest.MonkeyPatch.context() as patch:
        if asks:
            patch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
            patch.setattr(inference_workflow, "is_sm_at_least_100", lambda: True)
        quantize_named(model, config, names)
    return model.state_dict(), ANSWERED if asks else OWN


def quantize_named(model: torch.nn.Module, config: Any, names: Collection[str]) -> None:
    """torchao's ``quantize_`` of these parameters: weights of linear layers, and stacks of experts."""
    modules = {name.removesuffix(".weight") for name in names}
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name in modules)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if stacks := set(names) - linear:
        quantize_(model, FqnToConfig(OrderedDict.fromkeys(sorted(stacks), config)), filter_fn=None)


def _by_class(model: torch.nn.Module, scheme: Scheme, names: Collection[str]) -> dict[str, torch.Tensor]:
    config: Any = scheme.config
    size, algorithm = config.group_size, config.int4_choose_qparams_algorithm.value
    state = dict(model.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchao_int4, "pack_by_threads", _pack_by_blocks)
        for name in names:
            if scheme.layout.device == "cuda":
                state[name] = torchao_int4.for_cuda(state[name], size, algorithm)
            else:
                state[name] = torchao_int4.for_xpu(state[name], size)
    return state


def _pack_by_blocks(weight: list[list[int]], inner_k_tiles: int) -> list[Any]:
    """``warps.pack_by_threads``, whose blocks are alike: the threads of one block are run once."""
    nibbles = _nibbles(torch.tensor(weight), 2, highest_first=True).flatten(1)
    down, across = len(weight) // 8, nibbles.shape[1] // (16 * inner_k_tiles)
    blocks = nibbles.reshape(down, 8, across, -1).transpose(1, 2).flatten(2)
    words = sum(blocks[:, :, _places(inner_k_tiles)[:, :, at]] << (4 * at) for at in range(8))
    return torch.as_tensor(words).to(torch.int32).tolist()


@cache
def _places(inner_k_tiles: int) -> torch.Tensor:
    """Which code of a block each nibble of each word holds: the threads carry the number of its place, in digits."""
    numbers = torch.arange(8 * 16 * inner_k_tiles).reshape(8, -1)
    found = torch.zeros(WARP, inner_k_tiles // 2, 8, dtype=torch.long)
    for shift in (0, 4, 8):
        digit = (numbers >> shift) & 15
        packed = pack_by_threads(((digit[:, ::2] << 4) | digit[:, 1::2]).tolist(), inner_k_tiles)
        found += _nibbles(torch.tensor(packed)[0, 0], 8) << shift
    return found


def _nibbles(words: torch.Tensor, count: int, *, highest_first: bool = False) -> torch.Tensor:
    order = reversed(range(count)) if highest_first else range(count)
    return torch.stack([(words >> (4 * at)) & 15 for at in order], dim=-1)
