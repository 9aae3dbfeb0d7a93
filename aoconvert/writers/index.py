"""The index of a sharded checkpoint, ``*.bin.index.json`` or ``*.safetensors.index.json``.

Format: what ``huggingface_hub.save_torch_state_dict`` and transformers write: ``{"metadata": {"total_size": bytes},
"weight_map": {tensor: file}}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from aoconvert.errors import WriteError


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index in one step: readers see the old file, the new one, or none.

    Args:
        path: the index file; replaced when it exists.
        weight_map: tensor name -> file name, relative to the index.
        total_size: payload bytes of all tensors together.

    Raises:
        WriteError: the file cannot be written.
    """
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise WriteError(
            f"{path}: writing the index failed: {error.strerror or error}",
            hint="check the folder's permissions and the free space on its disk",
        ) from error
