"""Inputs for the smallest forward pass of a model of diffusers or transformers.

:func:`from_pipeline` and :func:`from_libraries` have the libraries make them; :func:`find_inputs` tries those, and asks
the model itself then: its signature, its config, and its own errors.
The package imports nothing of aoconvert, so that programs for fresh interpreters can load it by path.
"""

from .find import Found, NoInputs, find_inputs
from .library import Start, from_libraries, processor_folders
from .outputs import first_tensors, sqnr_db
from .pipeline import from_pipeline, list_calls
from .trial import available_memory, empty_copy

__all__ = [
    "Found",
    "NoInputs",
    "Start",
    "available_memory",
    "empty_copy",
    "find_inputs",
    "first_tensors",
    "from_libraries",
    "from_pipeline",
    "list_calls",
    "processor_folders",
    "sqnr_db",
]
