"""Inputs for the smallest forward pass of a model of diffusers or transformers.

:func:`find_inputs` asks the model itself: what its class offers, its signature, its config, and then its own errors.
The package imports nothing of aoconvert, so that programs for fresh interpreters can load it by path.
"""

from .find import Found, NoInputs, find_inputs
from .outputs import first_tensors, sqnr_db
from .trial import available_memory, empty_copy

__all__ = ["Found", "NoInputs", "available_memory", "empty_copy", "find_inputs", "first_tensors", "sqnr_db"]
