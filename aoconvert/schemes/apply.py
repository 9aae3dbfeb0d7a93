"""torchao's own quantization of one weight. No arithmetic of ours: a weight goes in a bare linear layer, and
``torchao.quantization.quantize_`` does the rest. Where torchao asks for a GPU first, :mod:`.direct` and :mod:`.int4`
call the same functions of torchao without the question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aoconvert.environment import import_torchao

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig

    from aoconvert.schemes.base import Scheme


def flatten(tensor: Any) -> tuple[tuple[str, ...], Any]:
    """Names of a torchao tensor's inner tensors, and the rest of what it takes to build it again."""
    names, context = tensor.__tensor_flatten__()
    return tuple(names), context


def unflatten(like: Any, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A torchao tensor of these inner tensors, with class, attributes, shape and strides of ``like``, also on meta."""
    _, context = flatten(like)
    tensor: torch.Tensor = type(like).__tensor_unflatten__(dict(parts), context, like.shape, like.stride())
    return tensor


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Quantize one weight of a linear layer.

    Args:
        weight: floating tensor of shape (out_features, in_features), or (experts, out_features, in_features) where the
            scheme has that rank, on any device; on ``meta`` the result has the real class and the real inner shapes,
            at no cost.
        scheme: what to quantize it to.

    Returns:
        torchao's tensor subclass of the same shape on the same device. Where torchao declines to quantize, the weight
        itself: compare the types.
    """
    return scheme.quantize(weight)


def quantize_with(weight: torch.Tensor, config: AOBaseConfig, meta_config: AOBaseConfig | None = None) -> torch.Tensor:
    """The same with a torchao config, whatever it is; but the layouts of int4 are more than their config.

    Args:
        weight: as above.
        config: of torchao.
        meta_config: another that gives the same class, shapes and dtypes on ``meta``, where this one does not work.
    """
    if weight.is_meta and meta_config is not None:
        config = meta_config
    import_torchao()
    import torch
    from torch import nn
    from torchao.quantization import quantize_

    from aoconvert.schemes import direct

    weight = weight.detach()
    if (quantizer := direct.quantizer(config)) is not None:
        with torch.no_grad():
            return quantizer(weight, config)
    if getattr(config, "set_inductor_config", False):
        # it only sets process-wide compiler flags, and imports the compiler (70 MB, seconds) to do so
        config = dataclasses.replace(config, set_inductor_config=False)
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        quantize_(linear, config)
    result = linear.weight.detach()
    # torchao gives the module an extra_repr bound to itself: a cycle that would keep every weight until the next
    # garbage collection
    linear.__dict__.pop("extra_repr", None)
    return result
