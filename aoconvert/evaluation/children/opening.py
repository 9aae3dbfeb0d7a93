"""How a model is opened to be run: by its library, with its weights left in the files wherever the library can.

A model that is opened in the dtype of its files, on the CPU, stays mapped: it takes no memory of its own, and may be
larger than the machine has. What does not fit on a GPU is distributed by ``accelerate``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from aoconvert.inputs import available_memory
from aoconvert.verification.children import library_opening

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def open_original(how: dict[str, Any], device: str) -> tuple[Any, str]:
    """The original in the dtype of its files, and that dtype.

    Args:
        how: as :func:`aoconvert.verification.library.originals` gives it.
        device: ``cpu``, one of torch's devices, or ``cuda:all``.

    Raises:
        CannotCompare: the library would read it into memory that is not there.
    """
    folder = Path(how["folder"])
    dtype = library_opening.stored_dtype(folder, how["variant"]) or getattr(torch, how["dtype"] or "float32")
    assert dtype in _DTYPES
    library_opening.require_memory(how, folder, "", how["variant"], available_memory())
    options = library_opening.dtype_option(how["library"], dtype)
    if how["variant"] is not None:
        options["variant"] = how["variant"]
    if distributes(device, sum(file.stat().st_size for file in library_opening.weights_files(folder, how["variant"]))):
        options["device_map"] = "auto"
    model, _ = library_opening.open_model(how, folder, "", **options)
    if device != "cpu" and "device_map" not in options:
        model = model.to(device)
    return model.eval(), str(dtype).removeprefix("torch.")


def open_quantized(code: str, device: str, nbytes: int) -> Any:
    """The result, by the code of its card; distributed where it does not fit on the device."""
    if distributes(device, nbytes):
        code = re.sub(r"(?m)^(model = .*\.from_pretrained\(.*)\)$", r'\1, device_map="auto")', code)
        code = re.sub(r"(?m)^(model|pipe)\.to\(device\)$", "", code)
    model = library_opening.run_code(code)
    return model.eval() if hasattr(model, "eval") else model


def distributes(device: str, nbytes: int) -> bool:
    """Whether a model is put on several devices, or partly left in memory or on disk."""
    if device.endswith(":all"):
        return True
    if device == "cpu":
        return False
    free, _ = torch.accelerator.get_memory_info(torch.device(device))
    return bool(nbytes * 1.2 > free)
