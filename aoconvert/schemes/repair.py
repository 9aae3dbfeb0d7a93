"""Values that torchao leaves without a scale.

Where all values that share a scale are zero, torchao 0.18's float8 gives them the scale 0 and codes 0 / 0, so that they
load as NaN (``_choose_scale_float8`` has no lower bound). NVFP4 does so for the scale of a whole weight of zeros. The
integers, MX and NVFP4's own groups have bounds. Rows whose scale is too small for float32 count as zeros as well.
"""

from __future__ import annotations

from typing import Any

# what torchao's nvfp4_quantize gives a group of zeros in a weight that has other values
_NVFP4_SMALLEST = 2.0**-6


def repair(tensor: Any) -> int:
    """Give values without a scale one, and the code 0, in place; they load as zeros then.

    Args:
        tensor: what :func:`aoconvert.schemes.apply.quantize_weight` returned, also a plain tensor or one on ``meta``.

    Returns:
        How many rows, groups, blocks or weights there were; 0: nothing was changed.
    """
    if tensor.is_meta:
        return 0
    if type(tensor).__name__ == "Float8Tensor":
        return _float8(tensor)
    if type(tensor).__name__ == "NVFP4Tensor" and tensor.per_tensor_scale is not None:
        return _nvfp4(tensor)
    return 0


def _float8(tensor: Any) -> int:
    import torch

    lost = tensor.scale == 0
    count = int(lost.sum())
    if count:
        where = lost
        for dim, size in enumerate(tensor.block_size):
            where = where.repeat_interleave(size, dim) if size > 1 else where
        tensor.qdata.view(torch.uint8).masked_fill_(where, 0)
        tensor.scale.masked_fill_(lost, 1.0)
    return count


def _nvfp4(tensor: Any) -> int:
    import torch

    lost = tensor.per_tensor_scale == 0
    count = int(lost.sum())
    if count:
        # one scale for a matrix, or one for each of the stacked experts
        tensor.qdata.view(torch.uint8).masked_fill_(lost, 0)
        smallest = torch.tensor(_NVFP4_SMALLEST).to(tensor.scale.dtype).view(torch.uint8)
        tensor.scale.view(torch.uint8).masked_fill_(lost, int(smallest))
        tensor.per_tensor_scale.masked_fill_(lost, 1.0)
    return count
