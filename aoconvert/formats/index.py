"""The index of a sharded checkpoint, ``*.bin.index.json`` or ``*.safetensors.index.json``.

Format: what ``huggingface_hub.save_torch_state_dict`` and transformers write: ``{"metadata": {"total_size": bytes},
"weight_map": {tensor: file}}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from aoconvert.errors import WriteError
from aoconvert.files import write_whole


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Write the index in one step: readers see the old file, the new one, or none.

    Args:
        path: the index file; replaced when it exists.
        weight_map: tensor name -> file name, relative to the index.
        total_size: payload bytes of all tensors together.

    Returns:
        What the file holds.

    Raises:
        WriteError: the file cannot be written.
    """
    values = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    content = (json.dumps(values, indent=2) + "\n").encode()
    try:
        write_whole(path, content)
    except OSError as error:
        raise WriteError(
            f"{path}: writing the index failed: {error.strerror or error}",
            hint="check the folder's permissions and the free space on its disk",
        ) from error
    return content
