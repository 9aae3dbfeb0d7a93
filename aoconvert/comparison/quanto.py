"""The weights of a Quanto checkpoint, whose files hold their parts as plain tensors."""

from __future__ import annotations

from dataclasses import replace

from aoconvert.comparison.opening import SidePart
from aoconvert.comparison.tensors import Leaf, StoredTensor
from aoconvert.formats.torch_bin.contents import BinTensor, StoredData
from aoconvert.rewriting.quanto.decide import collect, is_quanto


def put_together(part: SidePart, other: SidePart) -> SidePart:
    """A part with its weights in place of their parts; as it is where Quanto did not write it, or one is not whole.

    Args:
        part: of one side.
        other: what it is compared with, which tells the shapes of packed weights.
    """
    if not is_quanto(part.tensors) or not all(tensor.is_plain for tensor in part.tensors.values()):
        return part
    stored = {name: _entry(name, tensor.leaves[""]) for name, tensor in part.tensors.items()}
    found = collect(stored, {name: tensor.shape for name, tensor in other.tensors.items()})
    if found.problems:
        return part
    tensors = {
        name: _weight(entry, part) if entry.inner else part.tensors[name] for name, entry in found.tensors.items()
    }
    return replace(part, tensors=tensors | {name: part.tensors[name] for name in found.left_out})


def _entry(name: str, leaf: Leaf) -> BinTensor:
    data = StoredData(name, leaf.offset, leaf.nbytes, 0, leaf.stride)
    return BinTensor("torch.Tensor", leaf.dtype, leaf.shape, data, {}, {}, False, "cpu")


def _weight(entry: BinTensor, part: SidePart) -> StoredTensor:
    leaves = {
        key: part.tensors[inner.data.storage].leaves[""] for key, inner in entry.inner.items() if inner.data is not None
    }
    return StoredTensor(entry.class_name, entry.dtype, entry.shape, leaves, entry=entry)
