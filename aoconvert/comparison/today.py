"""A tensor of an old torchao or of Quanto in a class of today, with the same codes and scales: so it is compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from aoconvert.comparison.reading import OpenFiles, hold
from aoconvert.comparison.settings import import_metadata, settle_all, value_of_metadata
from aoconvert.comparison.tensors import FACTS, StoredTensor, leaf_of
from aoconvert.errors import AoconvertError, is_out_of_memory
from aoconvert.formats.dtypes import dtype_name
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.formats.torch_bin.safe_names import list_names
from aoconvert.rewriting.old_torchao.decide import decide
from aoconvert.rewriting.quanto.decide import BITS, BYTES
from aoconvert.rewriting.quanto.decide import decide as decide_quanto

_QUANTO = (BITS, BYTES)


def is_old(tensor: StoredTensor) -> bool:
    """Whether it has a class that torchao no longer has, or one of Quanto."""
    known = list_names().get(tensor.class_name)
    return tensor.class_name in _QUANTO or (known is not None and known.legacy)


def as_today(files: OpenFiles, tensor: StoredTensor) -> StoredTensor:
    """The tensor of today's class with the same codes and scales, in memory; its values where there is no such class.

    What nobody knows how to read is given back as it is.

    Args:
        files: that hold it.
        tensor: of an old class; others are given back.
    """
    entry = tensor.entry
    if entry is None or not is_old(tensor):
        return tensor

    def read(part: BinTensor) -> torch.Tensor:
        held = next((leaf for key, leaf in tensor.leaves.items() if entry.inner.get(key) is part), None)
        return files.read(held or leaf_of(part, tensor.file))

    try:
        outcome = decide_quanto(entry, read) if tensor.class_name in _QUANTO else decide(entry, read)
        made = outcome.make(read)
    except AoconvertError:
        raise
    except Exception as error:  # nobody knows a counterpart, or its parts do not fit each other
        if is_out_of_memory(error):
            raise
        return tensor
    if not outcome.is_carried:
        return replace(tensor, leaves={"": hold(made)}, settings={})
    return _describe(made)


def _describe(made: Any) -> StoredTensor:
    """A tensor in memory as if a file held it."""
    names, context = made.__tensor_flatten__()
    encoder = import_metadata().TensorSubclassAttributeJSONEncoder()
    attributes = {
        str(name): value_of_metadata(encoder.encode_value(value))
        for name, value in (context.items() if isinstance(context, dict) else ())
    }
    return StoredTensor(
        f"torchao.{type(made).__name__}",
        dtype_name(made.dtype),
        tuple(made.shape),
        {name: hold(getattr(made, name)) for name in names},
        settle_all({name: value for name, value in attributes.items() if name not in FACTS}),
        attributes,
    )
