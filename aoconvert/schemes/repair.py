"""Values that torchao leaves without a scale.

Where all values that share a scale are zero, torchao 0.18's float8 gives them the scale 0 and codes 0 / 0, so that they
load as NaN (``_choose_scale_float8`` has no lower bound). NVFP4 does so for the scale of a whole weight of zeros. The
integers, MX and NVFP4's own groups have bounds. Rows whose scale is too small for float32 count as zeros as well.
"""

from __future__ import annotations

from typing import Any

# what torchao's nvfp4_quantize gives a group of zeros in a weight that has other values
_NVFP4_SMALLEST = 2.0**-6


def repair_float8(tensor: Any) -> int:
    """Give rows, groups or blocks without a scale one, in place; how many there were."""
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


def repair_nvfp4(tensor: Any) -> int:
    """Give matrices without a scale one, in place; how many there were."""
    import torch

    if tensor.per_tensor_scale is None:
        return 0
    lost = tensor.per_tensor_scale == 0
    count = int(lost.sum())
    if count:
        # one scale for a matrix, or one for each of the stacked experts
        tensor.qdata.view(torch.uint8).masked_fill_(lost, 0)
        smallest = torch.tensor(_NVFP4_SMALLEST).to(tensor.scale.dtype).view(torch.uint8)
        tensor.scale.view(torch.uint8).masked_fill_(lost, int(smallest))
        tensor.per_tensor_scale.masked_fill_(lost, 1.0)
    return count
